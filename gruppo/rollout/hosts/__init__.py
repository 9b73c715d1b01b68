"""Reward hosts: actors of Ray that hold the worker processes of rewards and environments, on any machine.

What decides stays with the run: `RewardPool`, `WorkerSet` and `ProcessEnvironments` send the same messages to the same
processes, with the same limits. A host starts these processes on its machine and relays what they send and print.
"""
