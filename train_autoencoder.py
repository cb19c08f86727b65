"""Train an autoencoder; the loop is in stipple/commands/train_autoencoder.py.

accelerate launch train_autoencoder.py --config configs/autoencoder/emoji.yaml data.folder=PATH
accelerate launch train_autoencoder.py init_from=vae-ft-mse.safetensors data.folder=PATH
"""

from stipple.commands.train_autoencoder import main

if __name__ == "__main__":
    main()
