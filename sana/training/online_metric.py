"""`train.online_metric`: the model in training is measured by the suites of `sana.evaluation.suites`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sana.config import SanaConfig
from sana.evaluation import suites
from sana.generation import Settings
from sana.loading import load_text_encoder
from sana.models.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.training.features import load_autoencoder
from sana.training.tracker import Tracker
from sana.utils import distributed
from sana.utils.logging import first_line, get_logger

log = get_logger(__name__)


class OnlineMetric:
    """Draws and measures with the weights of a step, always from the same noise; numbers go to the tracker and to
    `results.jsonl` in `train.online_metric_dir` under the run's folder. Pictures that were measured are removed.

    Both encoders are loaded for each evaluation and released after it: with a cache of features training holds neither.

    Raises:
        ValueError: the config names an unknown suite.
    """

    def __init__(self, config: SanaConfig) -> None:
        self.config = config
        shapes = config.data.type == "SanaShapes"
        self.suites = config.train.online_metric_suites or (("shapes",) if shapes else ("geneval",))
        suites.require_known(self.suites)
        self.folder = Path(config.work_dir) / config.train.online_metric_dir

    @classmethod
    def of(cls, config: SanaConfig) -> OnlineMetric | None:
        """What a run evaluates with; None where the config wants nothing, or where no process has all the weights."""
        train = config.train
        if train.online_metric and train.use_fsdp:
            log.warning(
                "train.online_metric has no effect with train.use_fsdp: run scripts/evaluate.py on the checkpoints"
            )
        return cls(config) if train.online_metric and not train.use_fsdp else None

    def measure(self, transformer: SanaTransformer, step: int, tracker: Tracker) -> None:
        """Measure `transformer`, which keeps its mode; a failure of any kind is a line in the log.

        One process calls this and works alone; the others wait for it.
        """
        was_training, device = transformer.training, next(transformer.parameters()).device
        folder = self.folder / f"step_{step}"
        try:
            with torch.random.fork_rng(), distributed.alone():  # training goes on as without it
                outcome = self._evaluate(transformer.eval(), folder, step, tracker, device)
            if not outcome.failures:
                shutil.rmtree(folder)
        except Exception as error:  # noqa: BLE001 numbers are not worth a run, whatever went wrong
            log.warning("no online metric at step %d: %s: %s", step, type(error).__name__, first_line(error))
        finally:
            transformer.train(was_training)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _evaluate(
        self, transformer: SanaTransformer, folder: Path, step: int, tracker: Tracker, device: torch.device
    ) -> suites.Outcome:
        config, train = self.config, self.config.train
        pipeline = SanaPipeline.from_components(
            config, transformer, load_autoencoder(config, device), load_text_encoder(config, device)
        )

        def publish(report: suites.Report) -> None:
            suites.append_result(report, self.folder / "results.jsonl")
            values = suites.scalars(report)
            tracker.scalars(values, step)
            name, value = next(iter(values.items()))
            log.info("step %d  %s %.4f (%d pictures)", step, name.removeprefix("metrics/"), value, report.n)

        return suites.evaluate(
            pipeline,
            self.suites,
            suites.Sources(device=device, limit=train.online_metric_prompts),
            Settings(seed=train.seed, guidance_scale=config.model.cfg_scale),
            folder,
            batch_size=train.eval_batch_size,
            label=f"_step{step}",
            publish=publish,
        )
