"""`gruppo plan`: predict step time, memory and the split of devices from published figures, without any device."""
