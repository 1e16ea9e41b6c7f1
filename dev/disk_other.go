// The disk that forgets is Linux's.

//go:build !linux

package main

import (
	"context"
	"errors"
)

const diskCommand = "serve-a-disk"

var errNoDisk = errors.New("only Linux has it")

type disk struct{ mounted string }

func leaveMounts() error { return errNoDisk }

func startDisk(context.Context, string, int) (*disk, error) { return nil, errNoDisk }

func (d *disk) stop() {}

func runDisk(string, string) error { return errNoDisk }
