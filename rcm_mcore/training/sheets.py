"""What the student and its EMA make of the same prompts and noise every so many steps, as a picture (docs/sheets.md)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rcm_mcore.condition import Condition
from rcm_mcore.config import MID_TIMES, Config
from rcm_mcore.data import RankReaders, Sample
from rcm_mcore.data.media import thumbnails_of, to_pixels, write_contact_sheet
from rcm_mcore.data.vae import VideoVAE, find_vae
from rcm_mcore.diffusion.samplers import few_step_times, sample_few_step, sample_mean_flow, sample_ode
from rcm_mcore.distill.roles import conditioned, guided
from rcm_mcore.parallel.mesh import Mesh
from rcm_mcore.parallel.random import noise
from rcm_mcore.parallel.stages import as_function
from rcm_mcore.training.log import RunLog
from rcm_mcore.training.networks import Trained

log = logging.getLogger(__name__)

TEACHER_STEPS = 25  # of Euler, where a teacher is pretrained
_THUMBNAIL = 120  # pixels


def check_sheets(config: Config) -> None:
    """ValueError unless log.sheet_vae, if there is one, can decode the latents of the run."""
    folder = config.log.sheet_vae
    if folder is None:
        return
    try:
        channels = find_vae(folder)[1].get("z_dim", 16)
    except ValueError as error:
        raise ValueError(f"log.sheet_vae={folder}: {error}") from None
    if channels != config.model.in_channels:
        ours = f"model.in_channels={config.model.in_channels}"
        raise ValueError(f"log.sheet_vae={folder}: its latents have {channels} channels, those of the run {ours}")


class Sheets:
    """The sheets of a run. `prompts`: of its rows; `columns`: what each shows."""

    def __init__(self, config: Config, mesh: Mesh, networks: Sequence[Trained], negative: Tensor) -> None:
        """Collective: reads the samples whose prompts are shown, beside the run's own readers, which stay where they are.

        networks: of the run, the student (or the teacher in pretraining) first; negative [1, X, text_dim]. Raises ValueError
        and OSError on rank 0 for data that cannot be read.
        """
        self._config, self._mesh, self._networks, self._negative = config, mesh, networks, negative
        self._student = networks[0]
        self._network = as_function(self._student.net, mesh)
        self._is_teacher = config.train.objective == "pretrain"
        self._steps = (TEACHER_STEPS,) if self._is_teacher else config.log.sheet_steps
        weights = ("student", "ema") if self._student.optimizer.has_ema else ("student",)
        self.columns = [f"{name} {steps}" for name in weights for steps in self._steps]
        told = [_first_samples(config) if mesh.is_main else None]
        dist.broadcast_object_list(told)
        assert told[0] is not None, "rank 0 has read"
        self.prompts = [prompt for prompt, _ in told[0]]
        # Data-parallel ranks share the samples.
        self._mine = {i: told[0][i][1] for i in range(mesh.dp_rank, len(told[0]), mesh.dp_size)}

    def make(self, step: int, run_log: RunLog) -> None:
        """Collective: the sheet of the weights after `step` steps, `checkpoint.dir`/sheets/step_NNNNNNNNN.png.

        Gradient buffers are given back meanwhile, weights and optimizer stay as they are. A sheet that cannot be decoded or
        written is a warning and an event.
        """
        start = time.perf_counter()
        latents = self.latents()
        if latents is None:
            return
        path = Path(self._config.checkpoint.dir) / "sheets" / f"step_{step:09d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_contact_sheet(path, self._cells(latents), columns=len(self.columns))
        except Exception as error:  # a full disk, a VAE that does not fit: nothing that training needs
            log.warning("the sheet of step %d could not be made; the run goes on: %s", step, error)
            run_log.event("sheet_failed", path=str(path), reason=str(error))
            return
        run_log.event("sheet", path=str(path), seconds=time.perf_counter() - start)
        run_log.image("samples", path)

    @torch.no_grad()
    def latents(self) -> Tensor | None:
        """Collective: [prompts, columns, C, F, H, W], float32 on the CPU, on rank 0; None on the others."""
        for network in self._networks:
            network.sleep()
        made = {i: self._columns(i) for i in self._mine}
        if self._student.optimizer.has_ema:
            with self._student.optimizer.ema_weights():
                made = {i: made[i] + self._columns(i) for i in self._mine}
        return self._on_rank_0({i: torch.stack(columns) for i, columns in made.items()})

    def _columns(self, i: int) -> list[Tensor]:
        """Sample `i` of the weights that the network has now: [C, F, H, W] for each number of steps."""
        config, mesh = self._config, self._mesh
        condition = self._mine[i].map(lambda value: value.to(mesh.device))
        shape, seed = config.data.latent_shape, config.train.seed
        draw = lambda k: noise(f"sheet-{k}", shape, seed=seed, step=0, slots=[i]).to(mesh.device)
        if self._is_teacher:
            velocity = guided(self._network, condition, self._negative, config.distill.guidance)
            *_, x = sample_ode(velocity, draw(0), steps=TEACHER_STEPS, shift=config.pretrain.time.shift)
            return [x[0].float().cpu()]
        made = []
        for steps in self._steps:
            times = few_step_times(steps, mid_times=MID_TIMES[config.model.family])
            if config.model.interval:
                average = lambda x, s, end: self._network(x, s, condition._replace(end=end))
                x = sample_mean_flow(average, draw(0), times)
            else:
                x = sample_few_step(conditioned(self._network, condition), map(draw, range(steps)), times)
            made.append(x[0].float().cpu())
        return made

    def _on_rank_0(self, made: dict[int, Tensor]) -> Tensor | None:
        """All samples, from the ranks that read."""
        mesh, all_of_them = self._mesh, []
        for i in range(len(self.prompts)):
            owner = i % mesh.dp_size
            if mesh.is_main and owner != mesh.dp_rank:
                made[i] = torch.empty(len(self.columns), *self._config.data.latent_shape)
                dist.recv(made[i], dist.get_global_rank(mesh.dp_group, owner))
            elif mesh.reads and owner == mesh.dp_rank and not mesh.is_main:
                dist.send(made[i], 0)
            if mesh.is_main:
                all_of_them.append(made[i])
        return torch.stack(all_of_them) if mesh.is_main else None

    def _cells(self, latents: Tensor) -> list[tuple[str, list[np.ndarray]]]:
        """Captions and pictures, row by row."""
        folder = self._config.log.sheet_vae
        vae = None if folder is None else VideoVAE(folder, device=self._mesh.device, tiled=True)
        cells = []
        for prompt, row in zip(self.prompts, latents, strict=True):
            caption = " ".join(prompt.split())  # of one line
            cells += [(f"{column}: {caption}", pictures(x, vae)) for column, x in zip(self.columns, row, strict=True)]
        return cells


def pictures(latents: Tensor, vae: VideoVAE | None) -> list[np.ndarray]:
    """First, middle and last frame of latents [C, F, H, W]; grey where they are not finite."""
    video = colours(latents) if vae is None else vae.decode(latents[None])[0]
    return thumbnails_of(to_pixels(video.nan_to_num(0.0)).cpu().numpy(), height=_THUMBNAIL)


def colours(latents: Tensor) -> Tensor:
    """The first three channels of latents [C, F, H, W] as a video [3, F, H, W]: mean +- 2 standard deviations to [-1, 1]."""
    shown = latents[[min(c, len(latents) - 1) for c in range(3)]]
    return (shown - shown.mean()) / (2 * shown.std(correction=0)).clamp_min(1e-6)


def _first_samples(config: Config) -> list[tuple[str, Condition]]:
    """Prompts of the first samples of the run, and what a network is told of each, one sample a Condition, on the CPU."""
    readers = RankReaders(config.data, model=config.model, seed=config.train.seed, dp_rank=0, dp_size=1)
    try:
        samples = [readers.read(k) for k in range(config.log.sheet_samples)]
    finally:
        readers.close()
    return [(sample.prompt, _told(i, config, sample)) for i, sample in enumerate(samples)]


def _told(i: int, config: Config, sample: Sample) -> Condition:
    """What a network is told of sample `i`, as in training; the frames that are given are data.given_frames in turn."""
    condition = Condition(sample.embed[None])
    if config.model.image_tokens:
        assert sample.given is not None and sample.image is not None, "a sample without them is a bad one"
        return condition._replace(latents=sample.given[None], image=sample.image[None])
    if config.model.condition == "frames":
        frames = config.data.given_frames[i % len(config.data.given_frames)]
        return condition._replace(latents=sample.latent[None], frames=torch.tensor([frames]))
    return condition
