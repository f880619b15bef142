from guided_diffusion_vae.commands.check_roundtrip import create_argparser, main

if __name__ == "__main__":
    main.launch()
