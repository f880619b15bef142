"""Training batches: the items of each step from (seed, step), prepared ahead on a background thread."""

import collections
import hashlib
import math
import queue
import threading
import weakref

import numpy as np
import torch

from ..config import require
from ..interfaces import ConditionSource, ImageSource, LatentSource
from ..nn import keyed_randn, pin, to_device
from .labels import require_labels

ORDERED_AHEAD = 2**14                       # items whose order is computed at once
BULK_ITEMS, BULK_ELEMENTS = 1024, 2**23     # latents, and elements of them, that are read and normalized at once
_POSTERIOR = 1                              # random stream of posterior noise, distinct from others of the same seed


def permute_indices(positions, count, seed, epoch):
    """Return the images of `positions` (uint64 array) under a permutation of range(count) keyed by (seed, epoch).

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; values >= `count` are permuted again
    until they are below it (cycle walking, Black and Rogaway 2002). No table is stored, so memory does not grow with
    `count`.
    """
    half = np.uint64(max(2, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.sha512(f"permutation {seed} {epoch}".encode()).digest(), "<u8")
    values = np.array(positions, np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        values[outside] = left << half | right
        outside = values >= count
    return values


def _mix(values):
    """Return hashed uint64 values, element by element (finalizer of SplitMix64, Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BatchPlan:
    """The items of batch `step` on this rank, computed from (seed, step) alone.

    The items of all epochs form one stream, with another permutation per epoch. Slot k of step s is position
    s * batch_size * num_ranks + k of the stream; rank r has the slots from r * batch_size on, so two ranks with batch B
    see the same items as one rank with batch 2B. A batch may extend over the end of an epoch.

    :raises ValueError: if there are fewer items than slots of a step.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, num_ranks: int = 1, seed: int = 0,
                 shuffle: bool = True):
        self.global_batch = batch_size * num_ranks
        require((1 <= batch_size and self.global_batch <= count,
                 f"{count} items are fewer than one step requires: --batch_size {batch_size} on {num_ranks} ranks is "
                 f"{self.global_batch}; use a smaller batch, fewer ranks or more data"))
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.seed = seed
        self.shuffle = shuffle
        # `permute_indices` costs almost the same for one step as for thousands of items.
        self._steps_per_block = max(1, min(ORDERED_AHEAD, count) // self.global_batch)
        self._blocks: dict[int, np.ndarray] = {}

    def summary(self):
        """Return one line for the log: items per step and steps per epoch."""
        ranks = f"{self.num_ranks} rank{'s'[:self.num_ranks > 1]} with batch size {self.batch_size}"
        return (f"{ranks}: {self.global_batch} of {self.count} items per step, "
                f"{self.count / self.global_batch:.1f} steps per epoch")

    @property
    def slots(self):
        """The slots of this rank in the batch of all ranks."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def indices(self, step: int, steps: int = 1) -> np.ndarray:
        """Return the items of `steps` batches from batch `step` on, for this rank; int64 [steps * batch_size]."""
        blocks = range(step // self._steps_per_block, (step + steps - 1) // self._steps_per_block + 1)
        self._blocks = {b: self._blocks[b] if b in self._blocks else self._order(b) for b in blocks}
        start = (step - blocks.start * self._steps_per_block) * self.batch_size
        return np.concatenate(list(self._blocks.values()))[start:start + steps * self.batch_size]

    def _order(self, block):
        """Return the items of all steps of a block, for this rank."""
        steps = np.arange(block * self._steps_per_block, (block + 1) * self._steps_per_block, dtype=np.int64)
        firsts = steps * self.global_batch
        positions = (firsts[:, None] + np.array(self.slots, np.int64)).reshape(-1)
        epochs, offsets = np.divmod(positions, self.count)
        if not self.shuffle:
            return offsets
        items = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            items[in_epoch] = permute_indices(offsets[in_epoch], self.count, self.seed, int(epoch)).astype(np.int64)
        return items

    def flip_mask(self, step):
        """Return which items of batch `step` are flipped, each with probability 0.5; bool [batch_size]."""
        key = np.frombuffer(hashlib.sha256(f"coins {self.seed} {step}".encode()).digest()[:8], "<u8")
        return _mix(key + np.array(self.slots, np.uint64)) >> np.uint64(63) == 1

    def generators(self, step):
        """Return one NumPy Generator per item of batch `step`, keyed by (seed, step, slot)."""
        return [np.random.default_rng([self.seed % 2**64, step, slot]) for slot in self.slots]


class Prefetcher:
    """Prepare the batches of successive steps on a background thread.

    :param make_batch: step -> batch; called for start_step, start_step + stride, ... on one thread.
    :param depth: maximum number of batches that wait.
    :param end_step: first step that is not made; None: endless.
    """

    def __init__(self, make_batch, start_step=0, depth=2, end_step=None, stride=1):
        self._ready = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._error = None
        arguments = make_batch, start_step, end_step, stride, self._ready, self._room, self._stop
        self._thread = threading.Thread(target=_produce, args=arguments, daemon=True, name="prefetch")
        self._thread.start()
        # Also at exit: a thread that is still inside NumPy or torch while the interpreter ends would crash it.
        self._finalizer = weakref.finalize(self, _halt, self._stop, self._room, self._thread)

    def next(self):
        """Return the next batch; an exception in `make_batch` is raised here, at this and every further call."""
        if self._error is None and not self._stop.is_set():
            batch, self._error = self._ready.get()
            self._room.release()
            if self._error is None:
                return batch
        if self._error is not None:
            raise self._error
        raise RuntimeError("this Prefetcher is closed")

    def close(self):
        """Stop the thread after its current batch."""
        self._finalizer()


def _produce(make_batch, step, end_step, stride, ready, room, stop):
    while end_step is None or step < end_step:
        room.acquire()
        if stop.is_set():
            return
        try:
            ready.put((make_batch(step), None))
        except Exception as error:
            ready.put((None, error))
            return
        step += stride


def _halt(stop, room, thread):
    stop.set()
    room.release()
    if thread is not threading.current_thread():
        thread.join()


class BatchStream:
    """Endless iterator over batches that are prepared in the background; `seek` continues at any step.

    A subclass defines `make_batch`, and `finish` if something is left to do on the thread of the caller.

    :param steps_per_read: steps that `make_batch` prepares at once. `finish` returns a list of batches if more than 1.
    """

    def __init__(self, start_step=0, steps_per_read=1):
        self.step = start_step
        self.steps_per_read = steps_per_read
        self._ahead = None
        self._finished = collections.deque()

    def make_batch(self, step):
        """Return what `finish` needs for the batches of `steps_per_read` steps from `step` on; on another thread."""
        raise NotImplementedError

    def finish(self, prepared):
        """Return the batch (or list of batches) of a result of `make_batch`; work on a device belongs here."""
        return prepared

    def __iter__(self):
        return self

    def __next__(self):
        if not self._finished:
            if self._ahead is None:
                # A weak reference: a stream that is dropped without `close` must not be kept alive by its own thread.
                make_batch = weakref.WeakMethod(self.make_batch)
                self._ahead = Prefetcher(lambda step: make_batch()(step), self.step, stride=self.steps_per_read)
            batches = self.finish(self._ahead.next())
            self._finished.extend(batches if self.steps_per_read > 1 else [batches])
        self.step += 1
        return self._finished.popleft()

    def seek(self, step):
        """Continue with the batch of `step`."""
        if step != self.step:
            self.close()
            self.step = step

    def close(self):
        """Stop the background thread; the next batch starts it again."""
        self._finished.clear()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class ImageStream(BatchStream):
    """Stream of (images [n x C x ...] in [0, 1], {"y": int64 [n]} or {}) from an image source.

    Items, flips and random crops depend on (plan.seed, step, slot) alone. Batches are on the CPU, in pinned memory if
    `device` is a GPU.
    """

    def __init__(self, source: ImageSource, plan: BatchPlan, start_step: int = 0, with_labels: bool = False,
                 device="cpu"):
        require_labels(source, with_labels)
        super().__init__(start_step)
        self.source, self.plan, self.with_labels, self.device = source, plan, with_labels, device

    def make_batch(self, step):
        indices = self.plan.indices(step)
        flips = self.plan.flip_mask(step) if self.source.random_flip else None
        rngs = self.plan.generators(step) if self.source.random_crop else None
        conditioning = {"y": torch.from_numpy(self.source.labels[indices])} if self.with_labels else {}
        return pin(self.source.batch(indices, flips, rngs), self.device), conditioning


class LatentStream(BatchStream):
    """Stream of (normalized x0 [n x Z x ...] on `device`, conditioning dictionary) from a latent source.

    The conditioning is {"y": int64 [n]} `with_labels`, {"low_res": [n x Z x smaller ...]} with a second source
    `low_res` that has the same items at a lower resolution, {"condition": [n x K x ...]} with a `ConditionSource`, and
    {"attributes": float32 [n x A]} with those of all items.

    Items, flips and posterior noise depend on (plan.seed, step, slot) alone. Reading and sampling run in the
    background, for a GPU into pinned memory; encoding and normalizing run on the thread of the caller.

    :raises ValueError: if labels are required and missing, or the plan is for another number of items.
    """

    def __init__(self, source: LatentSource, normalizer, plan: BatchPlan, device, with_labels: bool = False,
                 low_res: LatentSource | None = None, start_step: int = 0, condition: ConditionSource | None = None,
                 attributes: np.ndarray | None = None):
        require_labels(source, with_labels)
        for latents in filter(None, (source, low_res)):
            require((plan.count == latents.count,
                     f"{latents.folder} has {latents.count} items, the batch plan is for {plan.count}"))
        # Latents of a cache are so small that transferring single batches between threads would dominate.
        elements = plan.batch_size * math.prod(source.latent_shape)
        bulk_steps = max(1, min(BULK_ITEMS // plan.batch_size, BULK_ELEMENTS // elements))
        # Condition images are files; thousands of them, and as images instead of latents, would be read at once.
        super().__init__(start_step, bulk_steps if source.supports_bulk_reads and not condition else 1)
        self.source, self.normalizer, self.plan, self.device = source, normalizer, plan, device
        self.with_labels, self.low_res, self.condition = with_labels, low_res, condition
        self.attributes = attributes

    def make_batch(self, step):
        steps = range(step, step + self.steps_per_read)
        indices = self.plan.indices(step, len(steps))
        eps = None
        if self.source.draws_posterior:
            keys = [(self.plan.seed, _POSTERIOR, s, slot) for s in steps for slot in self.plan.slots]
            eps = keyed_randn(self.source.latent_shape, keys)
        labels = self.source.labels_of(indices) if self.with_labels else None
        images = (source and self._read(source, indices, steps) for source in (self.low_res, self.condition))
        attributes = None if self.attributes is None else torch.from_numpy(self.attributes[indices])
        prepared = self._read(self.source, indices, steps), eps, labels, attributes, *images
        return tuple(None if tensor is None else pin(tensor, self.device) for tensor in prepared)

    def _read(self, source, indices, steps):
        flips = np.concatenate([self.plan.flip_mask(step) for step in steps]) if source.random_flip else None
        rngs = [rng for step in steps for rng in self.plan.generators(step)] if source.random_crop else None
        return source.read(indices, flips, rngs)

    def finish(self, prepared):
        values, eps, labels, attributes, low_res, condition = prepared
        conditioning = {} if labels is None else {"y": to_device(labels, self.device)}
        if attributes is not None:
            conditioning["attributes"] = to_device(attributes, self.device)
        if low_res is not None:
            conditioning["low_res"] = self.normalizer.normalize(self.low_res.latents(low_res, device=self.device))
        if condition is not None:
            conditioning["condition"] = self.condition.on_device(condition, self.device)
        x0 = self.normalizer.normalize(self.source.latents(values, eps, self.device))
        if self.steps_per_read == 1:
            return x0, conditioning
        batches = [tensor.split(self.plan.batch_size) for tensor in (x0, *conditioning.values())]
        return [(x, dict(zip(conditioning, rest))) for x, *rest in zip(*batches)]
