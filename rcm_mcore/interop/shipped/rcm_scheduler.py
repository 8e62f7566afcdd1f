"""rCM's few-step sampling (arXiv 2510.08431) as schedulers of diffusers' stock pipelines.

A student denoises at few fixed times and is given fresh noise between them. TrigFlow times t of the steps: arctan of
`rcm_sigma_max`, then the first of `rcm_mid_times`; both are in scheduler_config.json. Noise between steps comes from torch's
global generator (`torch.manual_seed`), since the pipelines hand none to `step`. Use guidance_scale=1.
"""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class _FewSteps(FlowMatchEulerDiscreteScheduler):
    """The times of the steps, whatever schedule the pipeline asks for."""

    def _times(self, steps):
        mid = list(self.config.rcm_mid_times)
        if not 1 <= steps <= len(mid) + 1:
            raise ValueError(f"num_inference_steps={steps}: this student has from 1 to {len(mid) + 1} steps")
        return [math.atan(self.config.rcm_sigma_max), *mid[: steps - 1]]

    def _set(self, sigmas, timesteps, device):
        self.num_inference_steps = len(timesteps)
        self.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=device)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)
        self._step_index = self._begin_index = None


class RCMFlowScheduler(_FewSteps):
    """For WanPipeline and WanImageToVideoPipeline, whose state is (1 - s) x0 + s noise, s = sin t / (sin t + cos t).

    They start from plain noise where rCM starts from s_0 noise: pass latents=noise * pipe.scheduler.init_noise_sigma.
    """

    @property
    def init_noise_sigma(self):
        """s_0, which scales the noise that sampling starts from."""
        t = self._times(1)[0]
        return math.sin(t) / (math.sin(t) + math.cos(t))

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """The first `num_inference_steps` steps of the student; other arguments of the pipelines are not used."""
        s = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in self._times(num_inference_steps)]
        self._set(s, [1000 * x for x in s], device)

    def step(self, model_output, timestep, sample, **options):
        """x0 = x - s v, then (1 - s') x0 + s' noise; float32 whatever the network's dtype."""
        return super().step(model_output.float(), timestep, sample, **options)


class RCMEDMScheduler(_FewSteps):
    """For Cosmos2TextToImagePipeline and Cosmos2VideoToWorldPipeline, whose state is x0 + sigma noise, sigma = tan t."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """As many steps of the student as `sigmas` has entries, which are not used."""
        steps = num_inference_steps if sigmas is None else len(sigmas)
        edm = [math.tan(t) for t in self._times(steps)]
        self._set(edm, [sigma / (1 + sigma) for sigma in edm], device)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **options):
        """x0 = x - sigma d, then x0 + sigma' noise; the pipelines overwrite the last sigma', which is 0."""
        if self.step_index is None:
            self._init_step_index(timestep)
        i = self.step_index or 0
        x0 = sample.float() - self.sigmas[i] * model_output.float()
        self._step_index = i + 1
        if i + 1 < len(self.timesteps):
            noise = torch.randn(x0.shape, generator=generator, dtype=torch.float32, device=x0.device)
            x0 = x0 + self.sigmas[i + 1] * noise
        return (x0,)
