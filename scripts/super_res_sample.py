from guided_diffusion_vae.commands.super_res_sample import create_argparser, main

if __name__ == "__main__":
    main.launch()
