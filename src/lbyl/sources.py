"""Where `load_source` used to be: saved folders and model cards of earlier versions name it."""

from lbyl.io.sources import load_source as load_source
