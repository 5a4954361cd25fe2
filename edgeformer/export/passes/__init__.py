"""Graph passes: each makes a traced float graph one step more ready to decode. In place, one file each."""
