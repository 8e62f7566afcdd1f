"""A network on its mesh, sampled again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rcm_mcore.checkpoint import load_network
from rcm_mcore.condition import Condition
from rcm_mcore.config import resolve_mesh
from rcm_mcore.data import load_embedding, pad_text
from rcm_mcore.diffusion.samplers import sample_few_step, sample_mean_flow, sample_ode
from rcm_mcore.diffusion.trigflow import Velocity
from rcm_mcore.distill.roles import Network, guided
from rcm_mcore.models import build_model
from rcm_mcore.parallel.mesh import destroy_mesh, make_mesh
from rcm_mcore.parallel.random import noise
from rcm_mcore.parallel.stages import as_function
from rcm_mcore.sampling.given import GivenEncoder, GivenFiles
from rcm_mcore.sampling.request import Draw, SamplerConfig, SampleRequest, check, check_request, draws_of, time_steps

if TYPE_CHECKING:
    from rcm_mcore.data.text import TextEncoder


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """What was made, the same on every rank."""

    latents: Tensor  # [n, C, F, H, W] float32, in the order of the samples
    evaluations: int  # forwards of one sample, a guided pair counting two
    seconds: float  # of the sampling loop alone, on the slowest rank


class Sampler:
    """A network of a checkpoint on a mesh, with its text encoder; closed by `close` or as a context manager.

        with Sampler(config) as sampler:  # collective: every rank of the default group
            rows = sampler.encode(prompts_of_this_group)
            latents = sampler.latents(indices_of_this_group, rows)

    The ranks that work on the same samples (tensor-, context- and pipeline-parallel ones) make the same calls and all get the
    result; data-parallel groups are independent of each other, and `sampler.mesh` says which this is (`dp_rank` of
    `dp_size`) and whether this rank is the one of its group that should write (`reads`).
    """

    def __init__(self, config: SamplerConfig) -> None:
        """Collective: checks, makes the mesh, loads the network. Raises ValueError as `check`, and for unusable files."""
        self.config = config
        self.model = check(config, int(os.environ.get("WORLD_SIZE", "1")))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # A process group of this sampler's own, which it leaves again. torchrun's can be joined only once.
        self._joined = not dist.is_initialized() and "RANK" not in os.environ
        resolved, self.context_parallelism = resolve_mesh(self.model, config.mesh, ranks_per_node=local)
        self.mesh = make_mesh(resolved)
        self.seconds = 0.0  # in the samplers, the first forward apart
        self._encoder: TextEncoder | None = None
        self._is_warm = False
        self._network: Network | None = None
        try:
            net = build_model(self.model, resolved, self.mesh.groups, seed=None, trainable=False)
            load_network(net, config.checkpoint, which=config.which)
            self._network = as_function(net, self.mesh)
            self._negative = self._load_negative()
        except BaseException:
            self._leave()
            raise

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget network and mesh; without torchrun, leave the default process group if there was none before."""
        self.free_text_encoder()
        self._network = None
        self._leave()

    def _leave(self) -> None:
        """Groups that are only forgotten keep their threads, some sixty a mesh, which poll."""
        destroy_mesh()
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()

    def _load_negative(self) -> Tensor:
        """Text of the unconditional branch [1, X, text_dim]."""
        length, width = self.model.text_len, self.model.text_dim
        if self.config.negative_embedding is not None:
            return load_embedding(self.config.negative_embedding, text_len=length, text_dim=width)[None]
        if self.config.negative_prompt is not None:
            return pad_text(self.encode([self.config.negative_prompt])[0], length)[None]
        return torch.zeros(1, length, width)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text rows [n_i, text_dim] of the prompts, float32 on the CPU; every one is encoded once.

        The encoder is loaded by the first call, on this rank's device and in the network's dtype (float32 for a wider one), and
        stays until `free_text_encoder`. Raises ValueError for a prompt longer than the network's text.
        """
        different = list(dict.fromkeys(prompts))
        for prompt, reason in self.too_long(different).items():
            raise ValueError(f"prompt {prompt[:60]!r} has {reason}")
        rows = dict(zip(different, self._text_encoder().encode(different)))
        return [rows[prompt] for prompt in prompts]

    def too_long(self, prompts: Sequence[str]) -> dict[str, str]:
        """Of prompts with more tokens than the network takes, how many they have. Loads the encoder, as `encode` does."""
        from rcm_mcore.data.text import MAX_TOKENS

        most = min(self.model.text_len, MAX_TOKENS)  # the encoder would cut the others
        reach = f"at most {most} reach the network (model.text_len={self.model.text_len})"
        counts = zip(prompts, self._text_encoder().token_counts(prompts))
        return {prompt: f"{tokens} tokens: {reach}" for prompt, tokens in counts if tokens > most}

    def _text_encoder(self) -> TextEncoder:
        from rcm_mcore.data.text import TextEncoder  # its tokenizer is not needed where text is encoded already

        if self._encoder is None:
            dtype = min(getattr(torch, self.model.dtype), torch.float32, key=lambda d: d.itemsize)
            self._encoder = TextEncoder(self.config.text_encoder, device=self.mesh.device, dtype=dtype)
        return self._encoder

    def encode_given(self, files: Sequence[tuple[str, ...]], given: GivenFiles) -> dict[tuple[str, ...], Condition]:
        """What the network is told of the files of samples (`GivenFiles.of_prompt`): of each different entry the condition of
        one sample, without text, on the CPU.

        The encoders are loaded, on this rank's device, and forgotten. Raises ValueError for folders and files that cannot be
        used.
        """
        encoder = GivenEncoder(given, self.model, device=self.mesh.device)
        told = {entry: encoder.encode(entry, self.config.latent_shape) for entry in dict.fromkeys(files)}
        del encoder
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        return told

    def free_text_encoder(self) -> None:
        """Give its memory back."""
        if self._encoder is not None:
            self._encoder = None
            if self.mesh.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def latents(
        self,
        indices: Sequence[int],
        rows: Sequence[Tensor],
        *,
        seeds: Sequence[int] | None = None,
        given: Condition | None = None,
    ) -> Tensor:
        """One batch of samples: latents [n, C, F, H, W], float32 on the CPU.

        Collective over the ranks that work on the same samples.

        Args:
            indices: of the samples. The noise of one depends on its seed and its index alone, not on the batch or the mesh.
            rows: of text, [n_i, text_dim] each.
            seeds: one for each sample; that of the configuration if left out.
            given: of `encode_given`, or the like: frames and images of networks that are told of some (`model.condition`); its
                text is not looked at.
        """
        condition = self._condition(rows, given)
        noises = self._noises(indices, [self.config.seed] * len(indices) if seeds is None else seeds)
        if not self._is_warm:  # the first call pays for allocations and compilation
            s = noises[0].new_full((len(indices),), 0.9)
            self._velocity(condition._replace(end=s) if self.model.interval else condition)(noises[0], s)
            self._is_warm = True
        self._synchronize()
        start = time.perf_counter()
        latents = self._integrate(condition, noises).float().cpu()
        self.seconds += time.perf_counter() - start
        return latents

    def run(
        self, draws: Sequence[Draw], *, batch_size: int, given: GivenFiles | None = None
    ) -> Iterator[tuple[list[Draw], Tensor]]:
        """This data-parallel group's share of the samples, in batches, with their latents [n, C, F, H, W]. Shows progress."""
        mine = list(draws[self.mesh.dp_rank :: self.mesh.dp_size])
        rows = self.encode([draw.prompt for draw in mine]) if mine else []
        self.free_text_encoder()
        told = self.encode_given([draw.given for draw in mine], given) if given is not None and mine else None
        # Said only where there is to be none, so that TQDM_DISABLE counts elsewhere.
        quiet: dict[str, Any] = {} if self.mesh.is_main else {"disable": True}
        bar = tqdm(total=len(draws), unit="video", dynamic_ncols=True, **quiet)
        with bar:
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                indices, seeds = [draw.index for draw in batch], [draw.seed for draw in batch]
                shown = None if told is None else Condition.cat([told[draw.given] for draw in batch])
                yield batch, self.latents(indices, rows[start : start + batch_size], seeds=seeds, given=shown)
                bar.update(min(len(batch) * self.mesh.dp_size, len(draws) - bar.n))

    def _condition(self, rows: Sequence[Tensor], given: Condition | None) -> Condition:
        """What the network is told, on its device."""
        padded = torch.stack([pad_text(r, self.model.text_len) for r in rows])
        condition = Condition(padded) if given is None else given.with_text(padded)
        return condition.map(lambda value: value.to(self.mesh.device))

    def _velocity(self, condition: Condition) -> Velocity:
        """The network under this condition: the only place where text reaches it."""
        assert self._network is not None, "the sampler is closed"
        return guided(self._network, condition, self._negative.to(self.mesh.device), self.config.guidance)

    def _noises(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Tensor]:
        """The start noise, and for the few-step sampler the fresh noise of each later step."""
        count = self.config.steps if self.config.sampler == "few_step" else 1
        shape = self.config.latent_shape
        draw = lambda k: [noise(f"sample-{k}", shape, seed=s, step=0, slots=[i]) for i, s in zip(indices, seeds, strict=True)]
        return [torch.cat(draw(k)).to(self.mesh.device) for k in range(count)]

    def _integrate(self, condition: Condition, noises: list[Tensor]) -> Tensor:
        config, times = self.config, time_steps(self.config)
        if config.sampler == "mean_flow":
            assert times is not None, "mean_flow has times"
            average = lambda x, s, end: self._velocity(condition._replace(end=end))(x, s)
            return sample_mean_flow(average, noises[0], times)
        velocity = self._velocity(condition)
        if config.sampler == "few_step":
            assert times is not None, "few_step has times"
            return sample_few_step(velocity, noises, times)
        *_, x = sample_ode(velocity, noises[0], steps=config.steps, shift=config.shift, solver=config.sampler)
        return x

    def _synchronize(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()


def sample(request: SampleRequest) -> SampleResult:
    """Collective: sample a whole request, dealt to the data-parallel ranks, and gather the latents."""
    check_request(request, int(os.environ.get("WORLD_SIZE", "1")))
    draws = draws_of(request)
    latents = torch.zeros(len(draws), *request.latent_shape)
    with Sampler(request) as sampler:
        mine: list[int] = []
        for batch, made in sampler.run(draws, batch_size=request.batch_size, given=request.given):
            where = [draw.number for draw in batch]
            latents[where] = made
            mine += where
        parts: list[Any] = [None] * sampler.mesh.dp_size
        dist.all_gather_object(parts, (mine, latents[mine], sampler.seconds), group=sampler.mesh.dp_group)
    for where, made, _ in parts:
        latents[where] = made
    return SampleResult(latents=latents, evaluations=request.evaluations, seconds=max(seconds for *_, seconds in parts))
