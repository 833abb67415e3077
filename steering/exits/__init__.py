"""The places at which thinking may stop, what a model shows there, and the rules that decide: live and on finished traces."""
