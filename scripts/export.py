from guided_diffusion_vae.commands.export import create_argparser, main

if __name__ == "__main__":
    main.launch()
