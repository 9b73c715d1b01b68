"""Rewards that live elsewhere: a language model as a judge, and reward servers, both over HTTP."""
