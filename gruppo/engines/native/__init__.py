"""The native engine samples with the transformers module that is being trained, in the same process."""
