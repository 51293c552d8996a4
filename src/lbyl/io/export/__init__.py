"""A saved network as one file that other runtimes load. A format is a file here, and a name in `lbyl._public`."""
