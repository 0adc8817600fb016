"""What the machines do while runs are on them."""
