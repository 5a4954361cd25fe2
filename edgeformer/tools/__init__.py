"""Tools for bundles and machines: doctor, bench, verify."""
