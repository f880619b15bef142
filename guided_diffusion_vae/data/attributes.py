"""Attributes that diffusion models are conditioned on: statistics of their training data, and values to sample at."""

from dataclasses import dataclass

import numpy as np

from ..config import CommaSeparated, require
from ..nn import keyed_rng

CONDITION_FLAG, UNKNOWN = "--condition_on", "unknown"
ATTRIBUTES = 0      # second number of the keys of sampled values; noise has others


def _range_of(text):
    name, _, value = (part.strip() for part in text.partition("="))
    low, dots, high = value.partition("..")
    ends = ("nan", "nan") if value == UNKNOWN else (low, high if dots else low)
    return name, *map(float, ends)


# Parsed to (name, low, high) of each.
attribute_ranges = CommaSeparated(
    "ranges", "comma-separated NAME=VALUE, NAME=LOW..HIGH or NAME=unknown, such as speed=1.2,range=0.5..2", _range_of,
    lambda ranges: all(name and (-np.inf < low <= high < np.inf or np.isnan([low, high]).all())
                       for name, low, high in ranges)
    and len({name for name, *_ in ranges}) == len(ranges))


@dataclass(frozen=True)
class Attributes:
    """Names of A attributes, and over the training data their mean, standard deviation and range, without NaN.

    `missing` are the fractions of items without a value. In headers this is a dictionary of lists.
    """

    names: tuple
    mean: tuple
    std: tuple
    low: tuple
    high: tuple
    missing: tuple

    @classmethod
    def of_source(cls, source, names):
        """Return the Attributes of an image or latent source, None for no `names`.

        :raises ValueError: if it has no attribute of a name, or a single value of it.
        """
        if not names:
            return None
        columns = _columns(source, names).astype(np.float64)
        for name, values in zip(names, columns.T):
            distinct = len(np.unique(values[~np.isnan(values)]))
            require((distinct > 1, f"{source.folder}: attribute {name} has {distinct} distinct values: expected at "
                                   f"least 2; omit it from {CONDITION_FLAG}"))
        facts = (function(columns, axis=0).tolist() for function in (np.nanmean, np.nanstd, np.nanmin, np.nanmax))
        return cls(tuple(names), *map(tuple, facts), tuple(np.isnan(columns).mean(0).tolist()))

    @classmethod
    def from_dict(cls, entry):
        """Return the Attributes of the entry of a header, None for None; inverse of `vars`."""
        return entry and cls(**{name: tuple(values) for name, values in entry.items()})

    def of_items(self, source):
        """Return the normalized values of all items of a source, float32 [N x A], NaN where they are unknown."""
        return self.normalize(self.raw_values(source))

    def raw_values(self, source):
        """Return the values of all items of a source, [N x A], NaN where they are unknown.

        :raises ValueError: if it does not have the attributes.
        """
        return _columns(source, self.names)

    def normalize(self, values):
        """Return values with mean 0 and standard deviation 1 over the training data, float32 [N x A]."""
        return ((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def parse_ranges(self, text):
        """Return (low, high) of each attribute that a text of `attribute_ranges` requests; omitted: as in training.

        :raises ValueError: for an attribute that the model does not have.
        """
        requested = {name: ends for name, *ends in attribute_ranges.parse(text, "attributes")}
        other = [name for name in requested if name not in self.names]
        require((not other, f"--attributes {text}: the model is not conditioned on {', '.join(other)}: expected "
                            f"{', '.join(self.names)}"))
        return tuple(tuple(requested.get(name, ends)) for name, *ends in zip(self.names, self.low, self.high))

    def warnings(self, ranges, has_null):
        """Return a line for each attribute whose requested range was not trained.

        :param has_null: whether attributes were dropped in training.
        """
        lines = []
        for name, (low, high), trained_low, trained_high, missing in zip(self.names, ranges, self.low, self.high,
                                                                         self.missing):
            if low != low and not (has_null or missing):
                lines.append(f"{name}={UNKNOWN}: in training it was known for every item")
            elif low < trained_low or high > trained_high:
                requested = f"{low:g}" if low == high else f"{low:g}..{high:g}"
                lines.append(f"{name}={requested} is outside of the training data, {trained_low:g}..{trained_high:g}")
        return lines


def sample_attributes(ranges, seed, indices):
    """Sample values uniformly within `ranges`, A pairs; float32 [N x A]. Row i depends on (seed, index i) alone."""
    low, high = np.array(ranges).T
    position = np.stack([keyed_rng(seed, ATTRIBUTES, i).random(len(ranges)) for i in indices])
    return (low + (high - low) * position).astype(np.float32)


def _columns(source, names):
    """Return the raw values of attributes of a source, [N x A]."""
    known = source.attributes
    absent = [name for name in names if name not in known]
    require((not absent, f"{source.folder} has no attribute {', '.join(absent)} ({CONDITION_FLAG}): expected a numeric "
                         f"column of its label file, got {', '.join(known) or 'none'}; add it (see docs/data.md)"))
    return np.stack([np.asarray(known[name]) for name in names], axis=1)
