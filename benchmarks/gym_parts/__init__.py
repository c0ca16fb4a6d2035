"""The context gym: images, networks and their twins, training, statistics, report."""
