"""A research group of agents that drives this framework from outside (freephdlabor).

It starts the framework's scripts and reads their files, nothing more.
"""
