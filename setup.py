from setuptools import setup

setup()  # all settings are in pyproject.toml; some tools still require a setup.py
