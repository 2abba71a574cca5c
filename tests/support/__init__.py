"""What several test modules share: data made on the spot, servers on loopback, and real runs of the commands."""
