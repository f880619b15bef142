from guided_diffusion_vae.commands.classifier_sample import create_argparser, main

if __name__ == "__main__":
    main.launch()
