"""A search by Optuna for small results that are near to the original: two objectives, both smaller is better.

Its trials lie in search.db (SQLite) of the sweep's folder. A killed search goes on: trials that were running are run
again, and what has a row needs no run. A model, text, recipe or space that has changed begins another study there.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit_eval.search.grid import Impossible
from quantkit_eval.search.results import Row
from quantkit_eval.search.run_worker import Job
from quantkit_eval.search.search_space import Range, range_of, written

DATABASE = "search.db"
ASKS = 20  # trials asked for per run, where the same settings come again and again


class Search:
    """Jobs of a study, one when it is asked for.

    wanted   different runs, failed ones included
    job_of   the job of some settings, or why they are impossible
    row_of   the row of a job's name, None where it has not run
    """

    def __init__(
        self,
        folder: Path,
        space: Mapping[str, tuple[str, ...]],
        wanted: int,
        seed: int,
        identity: Any,
        job_of: Callable[[Mapping[str, str]], Job | Impossible],
        row_of: Callable[[str], Row | None],
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._seed, self._wanted = optuna, seed, wanted
        self._job_of, self._row_of = job_of, row_of
        self._ranges = {key: found for key, values in space.items() if (found := range_of(key, values)) is not None}
        self._distributions = {
            key: _distribution(self._ranges[key]) if key in self._ranges else _choice(values)
            for key, values in space.items()
        }
        content = json.dumps([identity, {key: list(values) for key, values in space.items()}, seed], sort_keys=True)
        self._study = optuna.create_study(
            storage=f"sqlite:///{folder / DATABASE}",
            study_name=hashlib.sha256(content.encode()).hexdigest()[:16],
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        self._trials: dict[str, int] = {}  # row's name -> the trial that runs it
        self.settings: dict[str, Mapping[str, str]] = {}  # of every job, by its row's name
        self.impossible: list[Impossible] = []
        self._failed: set[str] = set()
        self._seen: set[tuple[str, ...]] = set()
        self._points = None if self._ranges else math.prod(len(values) for values in space.values())

    def jobs(self) -> Iterator[Job]:
        """What to run next, until enough different runs were asked for or no settings are left."""
        for trial in self._study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState.RUNNING]):
            if set(trial.params) != set(self._distributions):
                self._fail(trial.number)
            elif (job := self._taken(trial.number, trial.params)) is not None:
                yield job
        for trial in self._study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState.COMPLETE]):
            settings = self._settings(trial.params)
            job = self._job_of(settings)
            if isinstance(job, Job) and self._row_of(job.name) is not None:
                self._seen.add(tuple(settings.values()))
                self.settings.setdefault(job.name, settings)
        for _ in range(ASKS * self._wanted):
            if len(self.settings) >= self._wanted or len(self._seen) == self._points:
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # experimental features
                number = len(self._study.get_trials(deepcopy=False))
                self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed + number)
                trial = self._study.ask(self._distributions)
            if (job := self._taken(trial.number, trial.params)) is not None:
                yield job

    def tell(self, job: Job, row: Row | None) -> None:
        """What became of a job; None: it failed."""
        number = self._trials.pop(job.name)
        if row is None:
            self._failed.add(job.name)
            self._fail(number)
        else:
            self._study.tell(number, (float(row.size_bytes), row.kl.value))

    def _taken(self, number: int, params: Mapping[str, Any]) -> Job | None:
        """The job of a trial; None where it needs no run."""
        settings = self._settings(params)
        self._seen.add(tuple(settings.values()))
        job = self._job_of(settings)
        if isinstance(job, Impossible):
            if all(known.settings != settings for known in self.impossible):
                self.impossible.append(job)
            self._fail(number)
            return None
        if job.name in self._trials or job.name in self._failed:
            self._fail(number)
            return None
        self.settings.setdefault(job.name, settings)
        self._trials[job.name] = number
        if (row := self._row_of(job.name)) is not None:
            self.tell(job, row)
            return None
        return job

    def _settings(self, params: Mapping[str, Any]) -> dict[str, str]:
        return {
            key: written(params[key], self._ranges[key]) if key in self._ranges else str(params[key])
            for key in self._distributions
        }

    def _fail(self, number: int) -> None:
        self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)


def _choice(values: tuple[str, ...]) -> Any:
    from optuna.distributions import CategoricalDistribution

    return CategoricalDistribution(values)


def _distribution(numbers: Range) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    if numbers.whole:
        return IntDistribution(int(numbers.least), int(numbers.most), log=numbers.logarithmic)
    return FloatDistribution(numbers.least, numbers.most, log=numbers.logarithmic)
