from guided_diffusion_vae.commands.distill import create_argparser, main

if __name__ == "__main__":
    main.launch()
