from guided_diffusion_vae.commands.encode_dataset import create_argparser, main

if __name__ == "__main__":
    main.launch()
