from guided_diffusion_vae.commands.augmentation_study import create_argparser, main

if __name__ == "__main__":
    main.launch()
