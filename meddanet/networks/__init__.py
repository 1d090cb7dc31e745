"""The networks: segmenters and decision networks, built from plain numbers by `meddanet.build`."""
