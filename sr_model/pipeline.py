"""Sampling as a diffusers pipeline: FlowMatch Euler with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sr_model.codec import PixelCodec, VaeCodec, to_uint8
from sr_model.dit import DiT
from sr_model.flow import sigma_of
from sr_model.fusedit import FuseDiT
from sr_model.fusion import STATIC_IN_TIME
from sr_model.text_encoder import TextEncoder, language_model
from sr_model.text_features import Places, TextFeatures, TextKV


def captured(step: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`step` as a CUDA graph for arguments of these shapes; it has run once. Each answer replaces the last."""
    x, t, graph = x.clone(), t.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x, t)

    def replay(new_x: Tensor, new_t: Tensor) -> Tensor:
        x.copy_(new_x)
        t.copy_(new_t)
        graph.replay()
        return out

    return replay


class SemanticRoutingPipeline(DiffusionPipeline):
    """Text to image with a DiT conditioned on all layers of an LLM.

    Args:
        transformer: the DiT or FuseDiT.
        scheduler: a FlowMatchEulerDiscreteScheduler; its shift is the training's flow shift.
        text_encoder, tokenizer: the frozen LLM (a decoder stack without LM head) and its tokenizer.
        vae: an AutoencoderKL, or None for a DiT that works on pixels.
        prompt_template: text before every prompt. max_prompt_tokens: longer prompts are cut.
        default_size: side of a picture in pixels when none is asked for.

    Attributes, to compare speeds:
        cache_text_kv: keep keys and values over the steps where the strategy does not depend on time.
        cuda_graphs: on a GPU, capture a step once and replay it, so that its kernels start without the CPU.
    """

    cache_text_kv = True
    cuda_graphs = True
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: DiT | FuseDiT,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vae: AutoencoderKL | None = None,
        prompt_template: str = "",
        max_prompt_tokens: int = 512,
        default_size: int = 512,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )
        self.register_to_config(
            prompt_template=prompt_template, max_prompt_tokens=max_prompt_tokens, default_size=default_size
        )
        self._encoder: TextEncoder | None = None
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @property
    def guidance_scale(self) -> float:
        """Of the running or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that call also runs the negative prompts."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Its number of steps."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`: no further step is taken."""
        return self._interrupt

    @property
    def codec(self) -> PixelCodec | VaeCodec:
        """The latent codec: the VAE's, or pixels."""
        return PixelCodec() if self.vae is None else VaeCodec(self.vae)

    def encode_prompt(self, prompts: list[str]) -> TextFeatures | TextKV:
        """Features of the prompts at the layers the transformer reads; for a FuseDiT the LLM's keys and values."""
        hook: Any = getattr(self.text_encoder, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self.text_encoder)  # it waits on the CPU, and its own forward is not what is called
        llm, encoder = language_model(self.text_encoder), self._encoder
        if encoder is None or encoder.llm is not llm or encoder.tokenizer is not self.tokenizer:
            encoder = self._encoder = TextEncoder(
                llm,
                self.tokenizer,
                template=self.config.prompt_template,
                max_tokens=self.config.max_prompt_tokens,
            )
        encoder.read(**self.transformer.reads(encoder.num_layers))
        return encoder.encode(prompts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            prompt: one prompt or a list.
            negative_prompt: what guidance steers away from; one for all, or one a prompt. Default: the empty prompt.
            height, width: pixels; default `default_size`.
            num_inference_steps: Euler steps.
            guidance_scale: classifier-free guidance v = v_neg + scale (v - v_neg); at most 1 runs the prompt alone.
            num_images_per_prompt: pictures of every prompt, side by side in the result.
            generator: one for the batch, or one a picture (then a picture does not depend on its batch).
            latents: the starting noise [B, channels, h, w], in place of the generator's.
            output_type: "pil", "np" (float [B,H,W,3] in [0,1]), "pt" (float [B,3,H,W] in [0,1]) or "latent".
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": ...}); may return other latents.

        Raises: ValueError naming the argument.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt: wanted a string or a list of at least one, got {prompt!r}")
        prompts = list(prompts)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: wanted pil, np, pt or latent, got {output_type!r}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: wanted at least 1, got {num_inference_steps}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: wanted at least 1, got {num_images_per_prompt}")
        negatives = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
        if len(negatives) not in (1, len(prompts)):
            raise ValueError(f"negative_prompt: wanted 1 or {len(prompts)} prompts, got {len(negatives)}")
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: wanted {self._callback_tensor_inputs}, got {unknown}"
            )
        dit, codec = self.transformer, self.codec
        height = self.config.default_size if height is None else height
        width = self.config.default_size if width is None else width
        batch = len(prompts) * num_images_per_prompt
        shape = (batch, *codec.latent_shape(height, width))
        if min(height, width) < 1 or shape[2] % dit.config.patch_size or shape[3] % dit.config.patch_size:
            side = dit.config.patch_size * codec.factor
            raise ValueError(f"height, width: wanted multiples of {side}, got {height} and {width}")
        device, dtype = self._execution_device, dit.dtype
        x = self._starting_noise(shape, generator, latents).to(device)

        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, num_inference_steps, False
        guided = self.do_classifier_free_guidance
        if guided and len(negatives) == 1:
            negatives = negatives * len(prompts)
        asked = [*negatives, *prompts] if guided else prompts
        velocity = self._velocity([p for p in asked for _ in range(num_images_per_prompt)], num_inference_steps)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    break
                t = sigma_of(timestep.float() / self.scheduler.config.num_train_timesteps).view(1)
                x_in = torch.cat([x, x]) if guided else x
                v = velocity(x_in.to(dtype), t).float()
                if i == 0 and self.cuda_graphs and device.type == "cuda" and num_inference_steps > 2:
                    velocity = captured(velocity, x_in.to(dtype), t)  # the first step has warmed everything up
                if guided:
                    v_negative, v_text = v.chunk(2)
                    v = v_negative + guidance_scale * (v_text - v_negative)
                x = self.scheduler.step(-v, timestep, x, return_dict=False)[0]  # it integrates dx/dsigma = -v
                if callback_on_step_end is not None:
                    x = (callback_on_step_end(self, i, timestep, {"latents": x}) or {}).get("latents", x)
                bar.update()

        images = x if output_type == "latent" else self._pictures(codec.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, prompts: list[str], steps: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity (x [B, ...], t [1]) for these B prompts. Each different prompt is encoded and projected once."""
        dit = self.transformer
        different = list(dict.fromkeys(prompts))
        text = self.encode_prompt(different)
        places = Places.of(text, [different.index(p) for p in prompts])  # here: a captured step sends nothing
        if isinstance(text, TextKV):
            tapped = text.take(places)
            return lambda x, t: dit(x, t, tapped)
        if self.cache_text_kv and dit.config.strategy in STATIC_IN_TIME:  # one set of keys and values serves all steps
            kv = dit.condition(text, torch.zeros(1, device=text.mean.device)).take(places)
            return lambda x, t: dit(x, t, kv)
        folded = dit.folded(text, steps)
        return lambda x, t: dit(x, t, dit.condition(text, t, folded).take(places))

    @staticmethod
    def _starting_noise(
        shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Standard normal fp32, drawn on the generator's device (the CPU by default: the same on every machine)."""
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents: wanted shape {list(shape)}, got {list(latents.shape)}")
            return latents.float()
        if isinstance(generator, list):
            if len(generator) != shape[0]:
                raise ValueError(f"generator: wanted one or {shape[0]} generators, got {len(generator)}")
            return torch.cat([torch.randn(1, *shape[1:], generator=g, device=g.device) for g in generator])
        return torch.randn(shape, generator=generator, device=generator.device if generator else "cpu")

    @staticmethod
    def _pictures(images: Tensor, output_type: str) -> Any:
        pixels = to_uint8(images)  # [B, 3, H, W]
        if output_type == "pil":
            return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        unit = pixels.float() / 255
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
