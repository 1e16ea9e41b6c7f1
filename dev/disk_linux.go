// The disk that forgets as Linux sees it: a FUSE file system with one file, a loop device over that file, and ext4 on the device.
//
// A loop device passes writes on, and turns a flush into an fsync of its file: so the file's owner knows what a drive knows.
// The mounts are in a namespace of dev's own, which ends with its last process, however that ends.
//
// The owner is a process of its own, which dies with dev, and is not in that namespace. A process cannot be killed that waits for
// a disk which it serves itself. And the last process of a namespace unmounts what is in it before it lets go of its files.

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	// diskCommand is the hidden subcommand under which dev starts itself as a disk.
	diskCommand = "serve-a-disk"
	// ownMounts is set once dev is in a mount namespace of its own.
	ownMounts = "DEV_OWN_MOUNTS"
	// diskFD is where the process of a disk finds the kernel's end of its file system.
	diskFD = 3
	// maxIO is the largest read and write that the kernel may ask for.
	maxIO = 1 << 20
	// deviceFile is the one file of the FUSE file system.
	deviceFile = "disk"
)

// disk is a mounted disk that forgets.
type disk struct {
	child   *group
	ending  io.Closer // the child's stdin
	device  string    // where the FUSE file system is
	mounted string    // where ext4 is
}

// leaveMounts gives dev mounts of its own, and starts it over in them: a namespace is a thread's, and exec leaves only this
// thread. It returns when that is so already.
func leaveMounts() error {
	if os.Getenv(ownMounts) != "" {
		return os.Unsetenv(ownMounts)
	}
	if err := syscall.Unshare(syscall.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mounts of its own, which takes root: %w", err)
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts of its own: %w", err)
	}
	path, err := selfPath()
	if err != nil {
		return err
	}
	return syscall.Exec(path, os.Args, append(os.Environ(), ownMounts+"=1"))
}

// startDisk mounts the disk that dir has, or a new one of so many MB.
func startDisk(ctx context.Context, dir string, megabytes int) (d *disk, err error) {
	path, device, mounted := filepath.Join(dir, "disk.img"), filepath.Join(dir, "device"), filepath.Join(dir, "mounted")
	if err := errors.Join(os.MkdirAll(device, 0o755), os.MkdirAll(mounted, 0o755)); err != nil {
		return nil, err
	}
	if _, err := os.Stat(path); err != nil {
		if err := makeFileSystem(ctx, path, int64(megabytes)*megabyte); err != nil {
			return nil, err
		}
	}
	fd, err := syscall.Open("/dev/fuse", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	kernel := os.NewFile(uintptr(fd), "/dev/fuse")
	defer kernel.Close() // the disk's process has it
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,max_read=%d", fd, syscall.S_IFDIR, maxIO)
	if err := syscall.Mount("disk", device, "fuse.forgets", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		return nil, fmt.Errorf("mount a FUSE file system at %s: %w", device, err)
	}
	cmd, err := selfCommand(diskCommand, path, device)
	if err != nil {
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{kernel}
	d = &disk{device: device, mounted: mounted}
	if d.ending, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	said, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr
	if d.child, err = startGroup(cmd); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.ending.Close()
			d.child.wait()
		}
	}()
	if line, err := bufio.NewReader(said).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("no disk is served below %s: %w", device, err)
	} else {
		progress("%s", strings.TrimSpace(line))
	}
	if out, err := exec.CommandContext(ctx, "mount", "-t", "ext4", "-o", "loop", filepath.Join(device, deviceFile), mounted).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mount a loop device: %w %s", err, out)
	}
	return d, nil
}

// makeFileSystem makes an image of ext4, whole or not at all.
func makeFileSystem(ctx context.Context, path string, size int64) error {
	partial := path + ".partial"
	f, err := os.Create(partial)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size / sectorSize * sectorSize); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-b", fmt.Sprint(sectorSize), "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", partial).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.ext4 %s: %w %s", partial, err, out)
	}
	return os.Rename(partial, path)
}

// stop unmounts the disk, which flushes it, and ends it.
func (d *disk) stop() {
	if out, err := exec.Command("umount", d.mounted).CombinedOutput(); err != nil {
		progress("umount %s: %v %s", d.mounted, err, out)
	}
	d.ending.Close()
	d.child.wait()
	if err := syscall.Unmount(d.device, syscall.MNT_DETACH); err != nil { // else the directory could not be removed
		progress("umount %s: %v", d.device, err)
	}
}

// runDisk is the process of a disk: an image, served at a mount point of dev's until stdin ends.
func runDisk(path, device string) error {
	if err := leaveMounts(); err != nil {
		return err
	}
	if err := syscall.Unmount(device, syscall.MNT_DETACH); err != nil { // the copy in its own namespace
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil { // one that was killed may not be gone yet
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	early := []float64{0, 0.5}[rand.IntN(2)]
	file := &diskFile{disk: newVolatileDisk(f, early), size: uint64(info.Size())}
	root := &diskRoot{file: file}
	options := fuse.MountOptions{DisableXAttrs: true, DisableSplice: true, MaxWrite: maxIO}
	if _, err := fs.Mount(fmt.Sprintf("/dev/fd/%d", diskFD), root, &fs.Options{MountOptions: options}); err != nil {
		return fmt.Errorf("serve a FUSE file system: %w", err)
	}
	fmt.Printf("a disk that forgets what was not flushed, but for %.0f %% of it\n", early*100)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// diskRoot is the directory with the one file.
type diskRoot struct {
	fs.Inode
	file *diskFile
}

func (r *diskRoot) OnAdd(ctx context.Context) {
	r.AddChild(deviceFile, r.NewPersistentInode(ctx, r.file, fs.StableAttr{Mode: syscall.S_IFREG}), false)
}

// diskFile is the file under the loop device.
type diskFile struct {
	fs.Inode
	disk *volatileDisk
	size uint64
}

var (
	_ fs.NodeGetattrer = (*diskFile)(nil)
	_ fs.NodeOpener    = (*diskFile)(nil)
	_ fs.NodeReader    = (*diskFile)(nil)
	_ fs.NodeWriter    = (*diskFile)(nil)
	_ fs.NodeFsyncer   = (*diskFile)(nil)
)

func (f *diskFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = 0o600, f.size
	return fs.OK
}

// Open has no cache above the disk's own.
func (f *diskFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, fs.OK
}

func (f *diskFile) Read(_ context.Context, _ fs.FileHandle, p []byte, at int64) (fuse.ReadResult, syscall.Errno) {
	p = p[:max(0, min(int64(len(p)), int64(f.size)-at))]
	return fuse.ReadResultData(p), fs.ToErrno(f.disk.readAt(p, at))
}

func (f *diskFile) Write(_ context.Context, _ fs.FileHandle, p []byte, at int64) (uint32, syscall.Errno) {
	if at+int64(len(p)) > int64(f.size) {
		return 0, syscall.ENOSPC
	}
	return uint32(len(p)), fs.ToErrno(f.disk.writeAt(p, at))
}

func (f *diskFile) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return fs.ToErrno(f.disk.flush())
}
