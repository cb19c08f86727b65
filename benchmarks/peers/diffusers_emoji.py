"""The shipped model with diffusers and transformers alone, which `cold_start` compares with txt2img.py.

python -m benchmarks.peers.diffusers_emoji CHECKPOINT PROMPT OUTPUT.png STEPS SEED

StableDiffusionPipeline does not support a BertModel with masked padding, so the sampling loop is written out.
"""

import sys

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from transformers import BertModel, BertTokenizer

GUIDANCE_SCALE, LENGTH = 4.0, 32


@torch.inference_mode()
def main(folder: str, prompt: str, output: str, steps: str, seed: str) -> None:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizer = BertTokenizer.from_pretrained(folder, subfolder="tokenizer")
    read = dict(subfolder="text_encoder", dtype=torch.float32, add_pooling_layer=False)
    text_encoder = BertModel.from_pretrained(folder, **read)

    words = tokenizer([prompt, ""], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    tokens = text_encoder(words.input_ids, words.attention_mask).last_hidden_state
    scheduler.set_timesteps(int(steps))
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        pair = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        mask = words.attention_mask.bool()
        conditional, unconditional = unet(pair, timestep, tokens, encoder_attention_mask=mask).sample.chunk(2)
        guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    image = vae.decode(latents / vae.config.scaling_factor).sample
    VaeImageProcessor().postprocess(image)[0].save(output)
    print(output, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
