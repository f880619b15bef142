"""Choose the items of each batch from (seed, step), and read batches ahead in the background."""

import collections
import hashlib
import queue
import threading
import weakref

import numpy as np
import torch

from .listing import require_labels

ORDERED_AHEAD = 2**14   # items whose order is drawn at once


def permute_indices(positions, count, seed, epoch):
    """Return where a permutation of range(count), keyed by (seed, epoch), sends `positions` (uint64 array).

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; values beyond `count` are sent through
    again until they fall inside (cycle walking, Black and Rogaway 2002). No table is stored, whatever `count` is.
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
    """Return uint64 values scrambled one by one (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BatchPlan:
    """Say which items form batch `step` on this rank, from (seed, step) alone.

    The items of all epochs form one stream, each epoch a permutation of its own; slot k of step s is position
    s * batch_size * num_ranks + k of the stream, and rank r holds the slots from r * batch_size. So two ranks with
    batch B see what one rank with batch 2B sees, and a batch may reach over the end of an epoch.

    :raises ValueError: fewer items than one step takes.
    """

    def __init__(self, count, batch_size, rank=0, num_ranks=1, seed=0, shuffle=True):
        if batch_size < 1 or count < batch_size * num_ranks:
            raise ValueError(f"{count} items are fewer than one step takes: --batch_size {batch_size} on {num_ranks} "
                             f"ranks is {batch_size * num_ranks}; lower it, use fewer ranks or give more data")
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.seed = seed
        self.shuffle = shuffle
        # The last rounds of `permute_indices` go around with few items: of many at once they cost next to nothing.
        self._together = max(1, min(ORDERED_AHEAD, count) // (batch_size * num_ranks))
        self._ordered = {}

    def summary(self):
        """Return one line for the log: how many items a step and steps an epoch take."""
        together = self.batch_size * self.num_ranks
        ranks = f"{self.num_ranks} rank{'s'[:self.num_ranks > 1]} with {self.batch_size}"
        return f"{ranks} take {together} of {self.count} items a step, {self.count / together:.1f} steps an epoch"

    @property
    def slots(self):
        """This rank's places in the batch of all ranks."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def indices(self, step, steps=1):
        """Return the items of batch `step`, and of the `steps` from there on, on this rank, int64 [steps * batch_size].
        """
        blocks = range(step // self._together, (step + steps - 1) // self._together + 1)
        self._ordered = {b: self._ordered[b] if b in self._ordered else self._order(b) for b in blocks}
        begin = (step - blocks.start * self._together) * self.batch_size
        return np.concatenate(list(self._ordered.values()))[begin:begin + steps * self.batch_size]

    def _order(self, block):
        """Return the items of the `_together` batches of a block on this rank."""
        steps = np.arange(block * self._together, (block + 1) * self._together, dtype=np.int64)
        firsts = steps * (self.batch_size * self.num_ranks)
        positions = (firsts[:, None] + np.array(self.slots, np.int64)).reshape(-1)
        epochs, places = np.divmod(positions, self.count)
        if not self.shuffle:
            return places
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            items[now] = permute_indices(places[now], self.count, self.seed, int(epoch)).astype(np.int64)
        return items

    def flip_mask(self, step):
        """Return one fair coin per item of batch `step`, bool [batch_size]; they depend on (seed, step, slot) alone."""
        key = np.frombuffer(hashlib.sha256(f"coins {self.seed} {step}".encode()).digest()[:8], "<u8")
        return _mix(key + np.array(self.slots, np.uint64)) >> np.uint64(63) == 1

    def generators(self, step):
        """Return one numpy Generator per item of batch `step`, keyed likewise."""
        return [np.random.default_rng([self.seed % 2**64, step, slot]) for slot in self.slots]


class Prefetcher:
    """Make the batches of successive steps ahead in a background thread.

    :param make_batch: step -> batch; called for start_step, start_step + stride, ... by one thread.
    :param depth: batches that may wait.
    :param end_step: where to stop; None never.
    """

    def __init__(self, make_batch, start_step=0, depth=2, end_step=None, stride=1):
        self._ready = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._error = None
        arguments = make_batch, start_step, end_step, stride, self._ready, self._room, self._stop
        self._thread = threading.Thread(target=_produce, args=arguments, daemon=True, name="prefetch")
        self._thread.start()
        # Also at exit: a thread still inside numpy or torch while the interpreter ends would crash it.
        self._finalizer = weakref.finalize(self, _halt, self._stop, self._room, self._thread)

    def next(self):
        """Return the next batch; an exception of `make_batch` is raised here, again at every further call."""
        if self._error is None and not self._stop.is_set():
            batch, self._error = self._ready.get()
            self._room.release()
            if self._error is None:
                return batch
        if self._error is not None:
            raise self._error
        raise RuntimeError("this Prefetcher is closed")

    def close(self):
        """Stop the thread after the batch it is at."""
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
    """Iterate endlessly over (batch, extra), made ahead in the background; `seek` goes to the batch of any step.

    :param make_batch: step -> prepared batch, on a background thread.
    :param finish: prepared batch -> (batch, extra), on the caller's thread (what touches a device belongs here).
    :param together: where it is more than 1, so many steps are prepared and finished in one go, since small batches
        cost more to hand over than to read: `make_batch` is given the first step, `finish` returns a list.
    """

    def __init__(self, make_batch, start_step=0, finish=None, depth=2, together=1):
        self.step = start_step
        self._make_batch = make_batch
        self._finish = finish
        self._depth = depth
        self._together = together
        self._ahead = None
        self._finished = collections.deque()

    def __iter__(self):
        return self

    def __next__(self):
        if not self._finished:
            if self._ahead is None:
                self._ahead = Prefetcher(self._make_batch, self.step, self._depth, stride=self._together)
            made = self._ahead.next()
            made = self._finish(made) if self._finish else made
            self._finished.extend(made if self._together > 1 else [made])
        self.step += 1
        return self._finished.popleft()

    def seek(self, step):
        """Make `step` the next batch."""
        if step != self.step:
            self.close()
            self.step = step

    def close(self):
        """Stop reading ahead; the next batch starts it again."""
        self._finished.clear()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def image_batches(folder, plan, start_step=0, with_labels=False):
    """Return a `BatchStream` of (pictures [n x C x H x W] in [0, 1], {"y": int64 [n]} or {}).

    Flips and random crops, where the folder's configuration asks for them, depend on (plan.seed, step, slot) alone.
    """
    require_labels(folder, with_labels)

    def make_batch(step):
        indices = plan.indices(step)
        rngs = plan.generators(step) if folder.random_crop else None
        flips = plan.flip_mask(step) if folder.random_flip else None
        extra = {"y": torch.from_numpy(folder.labels[indices])} if with_labels else {}
        return folder.batch(indices, flips, rngs), extra

    return BatchStream(make_batch, start_step)
