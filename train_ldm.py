"""Train a latent diffusion model; the loop is in stipple/commands/train.py.

accelerate launch train_ldm.py --config configs/ldm/emoji.yaml data.folder=PATH autoencoder=runs/emoji-autoencoder/model
accelerate launch train_ldm.py init_from=sd-v1-5.safetensors data.folder=PATH
"""

from stipple.commands.train import main

if __name__ == "__main__":
    main()
