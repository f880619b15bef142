from guided_diffusion_vae.commands.image_edit import create_argparser, main

if __name__ == "__main__":
    main.launch()
