from guided_diffusion_vae.commands.train_autoencoder import create_argparser, main

if __name__ == "__main__":
    main.launch()
