"""The model card of an exported pipeline: what the student is, and the lines that sample with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

# What a pipeline must be given besides the prompt.
_GIVEN = {"WanImageToVideoPipeline": "image=image, ", "Cosmos2VideoToWorldPipeline": "image=image, fps=None, "}
_TAGS = {"WanPipeline": "text-to-video", "Cosmos2TextToImagePipeline": "text-to-image"}


def model_card(
    pipeline: str, times: Sequence[float], *, license: str, base_model: str, stock: bool, both_ends: bool = False
) -> str:
    """README.md of a pipeline of the class `pipeline` that samples at these TrigFlow times.

    stock: whether model_index.json names diffusers' own scheduler rather than the one in the folder. both_ends: whether the
        network is given the last frame too.
    """
    given = _GIVEN.get(pipeline, "") + ("last_image=last_image, " if both_ends else "")
    rf = ", ".join(f"{math.sin(t) / (math.sin(t) + math.cos(t)):.6f}" for t in times)
    wan = pipeline.startswith("Wan")
    usage = {
        (True, False): _WAN_TRUSTED,
        (True, True): _WAN_STOCK,
        (False, False): _COSMOS_TRUSTED,
        (False, True): _COSMOS_STOCK,
    }[wan, stock]
    return _CARD.format(
        license=license,
        base_model=base_model,
        tag=_TAGS.get(pipeline, "image-to-video"),
        steps=len(times),
        sigma_max=math.tan(times[0]),
        mid=", ".join(f"{t:g}" for t in times[1:]) or "none",
        rf=rf,
        usage=(usage + ("" if wan else _COSMOS_NOTES)).format(pipeline=pipeline, steps=len(times), rf=rf, given=given),
    )


_CARD = """\
---
license: {license}
base_model: {base_model}
library_name: diffusers
pipeline_tag: {tag}
tags:
- rcm
- distillation
---

A few-step student of {base_model}, distilled with rCM (score-regularized continuous-time consistency models,
[arXiv 2510.08431](https://arxiv.org/abs/2510.08431)) by rcm-mcore.

| | |
|---|---|
| steps | {steps} |
| sigma max | {sigma_max:g} |
| mid times (TrigFlow) | {mid} |
| times of the steps (rectified flow) | {rf} |
| guidance | none: guidance_scale=1 |

{usage}
Fewer steps take the first times. Noise between the steps comes from torch's global generator, hence `torch.manual_seed`.
`SHA256SUMS` lists every file: `sha256sum -c SHA256SUMS`.
"""

_WAN_TRUSTED = """\
The schedule is `scheduler/rcm_scheduler.py`, which diffusers runs when told to trust it:

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16, trust_remote_code=True).to("cuda")
torch.manual_seed(0)
noise = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device="cuda")
video = pipe(
    {given}prompt=prompt, height=height, width=width, num_frames=frames, num_inference_steps={steps}, guidance_scale=1.0,
    latents=noise * pipe.scheduler.init_noise_sigma,  # the pipeline itself would start from plain noise
).frames[0]
```

Without trusting it, put the transformer and the stock scheduler into the base pipeline, and tell it the times:

```python
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

sigmas = [{rf}]
transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
pipe = {pipeline}.from_pretrained(base, torch_dtype=torch.bfloat16, transformer=transformer, scheduler=scheduler)
set_timesteps = scheduler.set_timesteps
scheduler.set_timesteps = lambda n=None, device=None, **options: set_timesteps(n, device=device, sigmas=sigmas)
# then as above, with latents=noise * sigmas[0]
```
"""

_WAN_STOCK = """\
The scheduler is diffusers' own, which must be told the times:

```python
import torch
from diffusers import {pipeline}

sigmas = [{rf}]
pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
set_timesteps = pipe.scheduler.set_timesteps
pipe.scheduler.set_timesteps = lambda n=None, device=None, **options: set_timesteps(n, device=device, sigmas=sigmas)
torch.manual_seed(0)
noise = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device="cuda")
video = pipe(
    {given}prompt=prompt, height=height, width=width, num_frames=frames, num_inference_steps={steps}, guidance_scale=1.0,
    latents=noise * sigmas[0],  # the pipeline itself would start from plain noise
).frames[0]
```

`scheduler/rcm_scheduler.py` holds a scheduler that knows the times: `RCMFlowScheduler.from_config(pipe.scheduler.config)`.
"""

_COSMOS_TRUSTED = """\
The schedule is `scheduler/rcm_scheduler.py`, which diffusers runs when told to trust it:

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16, trust_remote_code=True).to("cuda")
torch.manual_seed(0)
result = pipe({given}prompt=prompt, num_inference_steps={steps}, guidance_scale=1.0)
```

To sample with many steps, as a teacher does, give the pipeline the scheduler of the base, whose settings are in the same file:

```python
from diffusers import FlowMatchEulerDiscreteScheduler

pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
```
"""

_COSMOS_STOCK = """\
The scheduler is the base's, for sampling with many steps; that of the student is in `scheduler/rcm_scheduler.py`:

```python
import sys
import torch
from diffusers import {pipeline}

sys.path.append(f"{{folder}}/scheduler")
from rcm_scheduler import RCMEDMScheduler

pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
pipe.scheduler = RCMEDMScheduler.from_config(pipe.scheduler.config)
torch.manual_seed(0)
result = pipe({given}prompt=prompt, num_inference_steps={steps}, guidance_scale=1.0)
```
"""

_COSMOS_NOTES = """
Video-to-world pipelines also need `fps=None`: the network was trained with positions that do not depend on it. diffusers builds
the norms of q and k with eps 1e-5 where the official network, and this one in training, has 1e-6.
"""
