"""Takes in jobs with their history: reads what is here of them, then judges and changes all in one go."""

from collections.abc import Callable, Sequence

import msgspec

from silo.clock import Clock
from silo.engine import importing
from silo.errors import SiloError, StoreCorrupt
from silo.model.attempt import Attempt
from silo.model.job import ImportedJob, JobState, JobStatus
from silo.shard.committer import Committer
from silo.shard.loader import Loader
from silo.shard.steps import Steps
from silo.storage import codec, keys
from silo.storage.store import Rows


class History(msgspec.Struct, frozen=True, gc=False):
    """What an import compares with."""

    state: JobState
    attempts: tuple[Attempt, ...]


Histories = dict[str, History | StoreCorrupt]
"""What stands of the jobs that an import names, by id; damaged ones with what is wrong."""


class Imports:
    """The imports of one shard."""

    def __init__(
        self,
        *,
        committer: Committer,
        loader: Loader,
        steps: Steps,
        clock: Clock,
        priority_step_ms: int,
        new_id: Callable[[], str],
    ) -> None:
        self._committer = committer
        self._loader = loader
        self._steps = steps
        self._clock = clock
        self._priority_step_ms = priority_step_ms
        self._new_id = new_id

    async def read(self, tenant: str, jobs: Sequence[ImportedJob]) -> Histories:
        """What stands of these jobs, with what their steps look at in memory; it holds until the next await.

        Jobs that do not exist are left out; of attempts there is what the import looks at.
        """
        counts = dict.fromkeys((job.id for job in jobs), 0)  # How many attempts of each are read.
        while True:
            rows = [keys.state_key(tenant, job_id) for job_id in counts]
            for job_id, count in counts.items():
                rows += [keys.attempt_key(tenant, job_id, number) for number in range(1, count + 1)]
            values = dict(zip(rows, await self._committer.read(rows), strict=True))
            found = {job_id: _history(values, tenant, job_id, count) for job_id, count in counts.items()}
            is_whole = True
            for job in jobs:
                match found[job.id]:
                    case History(state=state) if importing.compares_history(state, job):
                        if state.attempts_ended > counts[job.id]:
                            counts[job.id] = state.attempts_ended
                            is_whole = False
            here = [history.state for history in found.values() if isinstance(history, History)]
            if not is_whole:
                continue
            if all(map(self._loader.has, jobs)) and all(map(self._loader.has, here)):
                return {job_id: history for job_id, history in found.items() if history is not None}
            await self._loader.load([*jobs, *here])

    def take(self, jobs: Sequence[ImportedJob], histories: Histories) -> list[JobStatus | SiloError]:
        """Import all in order, now; for each its status, or why it was refused.

        Raises:
            StateForbids: one of the jobs runs; nothing was changed.
        """
        importing.check_none_runs(
            history.state for history in histories.values() if isinstance(history, History)
        )
        answers: list[JobStatus | SiloError] = []
        for job in jobs:
            try:
                answers.append(self._take(job, histories))
            except SiloError as refusal:
                answers.append(refusal)
        return answers

    def _take(self, job: ImportedJob, histories: Histories) -> JobStatus:
        history = histories.get(job.id)
        if isinstance(history, StoreCorrupt):
            raise history
        now_ms = self._clock.now_ms()
        if history is None:
            change = importing.import_new(
                job, new_task_id=self._new_id, now_ms=now_ms, priority_step_ms=self._priority_step_ms
            )
        else:
            change = importing.reimport(
                self._as_it_stands(history.state),
                history.attempts,
                job,
                new_task_id=self._new_id,
                now_ms=now_ms,
                priority_step_ms=self._priority_step_ms,
            )
        change = self._steps.take(change)
        assert change.after is not None
        earlier = history.attempts if history is not None else ()
        histories[job.id] = History(change.after, earlier + change.attempts)
        return change.after.status

    def _as_it_stands(self, state: JobState) -> JobState:
        """A job that another one of this import may have moved on, by a ticket that came free."""
        row = self._committer.rows.get(keys.state_key(state.tenant, state.job_id))
        return state if row is None else codec.decode(JobState, row)


def _history(values: Rows, tenant: str, job_id: str, count: int) -> History | StoreCorrupt | None:
    """A job with its first `count` attempts; what is damaged is the trouble of this job only."""
    row = values[keys.state_key(tenant, job_id)]
    if row is None:
        return None
    try:
        state = codec.decode(JobState, row)
        found = [values[keys.attempt_key(tenant, job_id, number)] for number in range(1, count + 1)]
        # There are fewer when the job was made anew while its attempts were read.
        attempts = tuple(
            codec.decode(Attempt, row) for row in found[: state.attempts_ended] if row is not None
        )
    except StoreCorrupt as error:
        return error
    if len(attempts) < min(count, state.attempts_ended):
        return StoreCorrupt("attempts are missing from a job's history", job_id=job_id)
    return History(state, attempts)
