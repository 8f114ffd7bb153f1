"""Brings checkpoints up the tiers NVMe, DRAM, DEVICE and decides what stays there."""
