package main

func vaes512(bool) {}
