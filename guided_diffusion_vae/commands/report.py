"""Write report.html: curves, samples, metrics and configuration of one run or several.

    python scripts/report.py runs/diffusion
    python scripts/report.py runs/diffusion runs/samples runs/evaluation --out pipeline.html

The page is one file that loads nothing from a network. Samples are shown with their nearest training images if one of
the runs evaluated them with --train_dir. Training, sampling and evaluation write the page of their own run folder at
the end, unless --report False is set."""

from .. import dist_util
from ..evaluation.report_page import ReportConfig, write_page
from ..runs.run import script


@script(__doc__, ReportConfig)
def main(run):
    if dist_util.rank() == 0:
        config = run[ReportConfig]
        print(f"report page: {write_page(config.folders, config.out, config.gallery_samples)}")


create_argparser = main.argparser
