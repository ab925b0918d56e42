"""Jobs of visitors: they queue, compute in turns within a budget, and end when nobody listens.

A turn goes to the visitor with the least recent computing time, by address first and by session
second, so that new sessions gain nothing. A session's time counts more in a large job. Turns change
between the layers of a network; see `pause_before_layers`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SHARE = 8  # jobs of a session at once
ROOM = 32  # jobs of all that compute at once; fewer than gradio has threads
LINE = 256  # jobs that wait for room; each has a thread, which sleeps
BUDGET = 1 << 16  # work of a session at once: images x steps, tokens x texts, or characters
LARGE = 4096  # work of a job whose time counts twice; thrice at double that, and so on
TURN = 0.1  # seconds, if others wait
LOOK = 1.0  # seconds after which a job in the queue looks whether somebody still waits for it
PATIENCE = 1.0  # seconds without a pause, after which the next job starts beside this one
GRACE = 10.0  # seconds after which a job ends that nobody listens to; it gets no turn meanwhile
HALF_LIFE = 30.0  # seconds in which computing time of the past loses half its weight

Visitor = tuple[str, str]  # address, session


def no_one(_text: str) -> None:
    """Take what a job waits for, where nobody is to read it."""


class DroppedError(Exception):
    """A job ends before it is done."""


@dataclass(eq=False)
class Job:
    """A visitor's request that computes.

    Args:
        heard: returns whether somebody still waits for the result.
        last: when `heard` was last true.
        work: images x steps, tokens x texts, or characters that it has claimed.
        spent: seconds of its turns.
        name: what it does, by which its visitor can stop it.
        tell: called with words for what it waits for; `no_one` of a job that does not queue.
        waits: whether it waits for its turn.
        inside: whether it is one of those that take turns.
        place: that was said last, in the queue of those that do not yet; 0 if none was.
        dropped: why it must end; "" if it need not.
    """

    visitor: Visitor
    heard: Callable[[], bool]
    name: str = ""
    tell: Callable[[str], object] = no_one
    last: float = field(default_factory=time.monotonic)
    work: int = 0
    spent: float = 0.0
    waits: bool = False
    inside: bool = False
    place: int = 0
    dropped: str = ""


class JobQueue:
    """The jobs that are not done, and whose turn it is."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._moved = threading.Condition(lock)  # of those that are not inside
        self._jobs: list[Job] = []  # as they came
        self._turn: Job | None = None
        self._since = 0.0
        self._spent: dict[str | Visitor, float] = {}  # seconds of an address, of a session
        self._faded = 0.0
        self._listeners: Counter[Visitor] = Counter()
        self._own = threading.local()

    # -----------------------------------------------------------------------------------------
    # For the threads of requests

    @contextmanager
    def listening(self, visitor: Visitor) -> Iterator[None]:
        """Record, inside the block, that a visitor waits for the outcome of its jobs."""
        with self._changed:
            self._listeners[visitor] += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._listeners -= Counter([visitor])

    def is_heard(self, visitor: Visitor) -> bool:
        """Whether a visitor waits for the outcome of its jobs."""
        return self._listeners[visitor] > 0

    @contextmanager
    def job(
        self,
        visitor: Visitor,
        heard: Callable[[], bool],
        name: str = "",
        tell: Callable[[str], object] = no_one,
    ) -> Iterator[None]:
        """Run the block as a job of this thread, when it is its turn.

        Raises:
            ValueError: there are too many jobs.
            DroppedError: nobody listens any more, or the job gives way to others.
        """
        job = Job(visitor, heard, name, tell)
        self._add(job)
        self._own.job = job
        try:
            self._wait(job)
            yield
        finally:
            self._own.job = None
            with self._changed:
                self._jobs.remove(job)
                self._end_turn(job)
                self._moved.notify_all()

    def _add(self, job: Job) -> None:
        """Add a job; where there is no room, the visitor with the most jobs loses one."""
        with self._changed:
            # those dropped hold their thread until their next pause
            if sum(other.visitor == job.visitor for other in self._jobs) >= SHARE:
                raise ValueError(f"{SHARE} of your requests are not done yet; wait for one")
            jobs = [other for other in self._jobs if not other.dropped]
            inside, queues = [other for other in jobs if other.inside], job.tell is not no_one
            if len(inside) >= ROOM:
                full = len(jobs) >= ROOM + LINE
                most = _greediest([*(jobs if full and queues else inside), job])
                if most is not job:
                    most.dropped = "stopped, as others wait and you have the most requests"
                    self._wake()
                elif full or not queues:
                    raise ValueError("this page has too much to do; try again in a while")
            job.inside = not queues
            self._jobs.append(job)

    def _wake(self) -> None:
        self._changed.notify_all()
        self._moved.notify_all()

    def stop(self, visitor: Visitor, name: str) -> None:
        """End the jobs of a visitor that have this name, at their next pause."""
        with self._changed:
            for job in self._jobs:
                if (job.visitor, job.name) == (visitor, name):
                    job.dropped = "stopped"
            self._wake()

    # -----------------------------------------------------------------------------------------
    # For the job of this thread; without one, these do nothing

    def claim(self, work: int, what: str) -> None:
        """Add to the work of this thread's job, before it is done.

        Args:
            work: images x steps, tokens x texts, or characters.
            what: their name, for the message.

        Raises:
            ValueError: the budget of the session is spent.
        """
        job = self._own_job()
        if job is None:
            return
        with self._changed:
            own = [other for other in self._jobs if other.visitor == job.visitor]
            if sum(other.work for other in own) + work > BUDGET:
                raise ValueError(
                    f"{what}: {work:,} are too much beside your other requests; all together may "
                    f"have {BUDGET:,}"
                )
            job.work += work

    def pause(self) -> None:
        """Let others take their turns, if this job had its own.

        Raises:
            DroppedError: nobody listens any more, or the job gives way to others.
        """
        job = self._own_job()
        in_turn = self._turn is job and time.monotonic() < self._since + TURN
        if job is None or (in_turn and not job.dropped):
            return
        with self._changed:
            self._end_turn(job)
        self._wait(job)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let others take their turns while this job waits for something else."""
        job = self._own_job()
        if job is None:
            yield
            return
        with self._changed:
            self._end_turn(job)
        self._own.job = None
        try:
            yield
        finally:
            self._own.job = job
        self._wait(job)

    def tell(self, text: str) -> None:
        """Say what this thread's job waits for."""
        if job := self._own_job():
            job.tell(text)

    @contextmanager
    def telling(self, text: str, after: float) -> Iterator[None]:
        """Say what this thread's job waits for if the block takes longer than some seconds."""
        job = self._own_job()
        timer = threading.Timer(after, job.tell if job else no_one, [text])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # what is said is not said after the block

    # -----------------------------------------------------------------------------------------
    # Turns

    def _own_job(self) -> Job | None:
        return getattr(self._own, "job", None)

    def _wait(self, job: Job) -> None:
        with self._changed:
            job.waits = True
            try:
                while not self._begins_turn(job):
                    # a listener may have left
                    self._changed.wait(TURN) if job.inside else self._moved.wait(LOOK)
            finally:
                job.waits = False

    def _begins_turn(self, job: Job) -> bool:
        now = time.monotonic()
        if job.dropped:
            raise DroppedError(job.dropped)
        job.last = now if job.heard() else job.last
        if now > job.last + GRACE:
            raise DroppedError("stopped, as nobody listened")
        if not job.inside and not self._enters(job):
            return False
        if self._turn and now < self._since + PATIENCE:
            return False
        ready = [each for each in self._jobs if each.waits and each.inside and each.heard()]
        if not ready or min(ready, key=self._had) is not job:
            return False
        if self._turn:
            self._end_turn(self._turn)
        self._turn, self._since = job, now
        return True

    def _enters(self, job: Job) -> bool:
        """Let a job in if there is room, or tell its place.

        First come those of whom the fewest are inside, by address and then by session.
        """
        inside = [other for other in self._jobs if other.inside and not other.dropped]
        addresses = Counter(other.visitor[0] for other in inside)
        sessions = Counter(other.visitor for other in inside)
        line = sorted(
            (other for other in self._jobs if not other.inside and not other.dropped),
            key=lambda other: (addresses[other.visitor[0]], sessions[other.visitor]),
        )
        place = line.index(job) + 1
        job.inside = place <= ROOM - len(inside)
        if job.inside and job.place:
            job.tell("It is your turn")
        elif not job.inside and place != job.place:
            job.place = place
            job.tell(f"Place {place} in the queue")
        return job.inside

    def _had(self, job: Job) -> tuple[float, float, float]:
        address, session = self._spent.get(job.visitor[0], 0.0), self._spent.get(job.visitor, 0.0)
        return address, session * (1 + job.work / LARGE), job.spent

    def _end_turn(self, job: Job) -> None:
        """If it is this job's turn, end it and add its time; earlier times lose weight."""
        if self._turn is not job:
            return
        now = time.monotonic()
        fading, self._faded = 0.5 ** ((now - self._faded) / HALF_LIFE), now
        self._spent = {who: s * fading for who, s in self._spent.items() if s * fading > 0.01}
        job.spent += now - self._since
        for who in (job.visitor[0], job.visitor):
            self._spent[who] = self._spent.get(who, 0.0) + now - self._since
        self._turn = None
        self._changed.notify_all()


def _greediest(jobs: list[Job]) -> Job:
    """Return the last job of the address, and then of the session, with the most jobs."""
    addresses = Counter(job.visitor[0] for job in jobs)
    sessions = Counter(job.visitor for job in jobs)
    return max(reversed(jobs), key=lambda job: (addresses[job.visitor[0]], sessions[job.visitor]))


QUEUE = JobQueue()


def pause_before_layers() -> None:
    """Let every layer of every network pause before it computes, from now on."""
    import torch

    def pause(_layer: torch.nn.Module, _inputs: object) -> None:
        QUEUE.pause()

    torch.nn.modules.module.register_module_forward_pre_hook(pause)
