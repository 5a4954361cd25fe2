"""What looks at bundles and machines: doctor, bench, verify."""
