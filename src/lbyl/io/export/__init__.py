"""Exports a saved network as one file for other runtimes. A format is a file here, and a name in `lbyl._public`."""
