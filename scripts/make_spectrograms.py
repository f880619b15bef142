from guided_diffusion_vae.commands.make_spectrograms import create_argparser, main

if __name__ == "__main__":
    main.launch()
