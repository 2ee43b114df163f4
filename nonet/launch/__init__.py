"""How ranks come to be: on this host by fork, elsewhere by torchrun, Slurm or Kubernetes."""
