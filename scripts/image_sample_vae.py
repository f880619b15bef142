from guided_diffusion_vae.commands.image_sample_vae import create_argparser, main

if __name__ == "__main__":
    main.launch()
