"""Layout tables of MoE checkpoints, one TOML per layout family; see README.md beside this file."""
