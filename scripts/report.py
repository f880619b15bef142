from guided_diffusion_vae.commands.report import create_argparser, main

if __name__ == "__main__":
    main.launch()
