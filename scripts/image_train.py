from guided_diffusion_vae.commands.image_train import create_argparser, main

if __name__ == "__main__":
    main.launch()
