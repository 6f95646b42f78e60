// ociimage packs static binaries and plain files into a container image, without a container engine.
//
// The image is an OCI archive with one uncompressed layer. Equal input gives an equal digest: timestamps are zero, owners
// are root, entries are sorted, and of a file's mode only "executable or not" is kept.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

const usage = `Packs static binaries and plain files into a one-layer OCI archive, and prints the image's digest.

usage: ociimage --out IMAGE.tar --name docker.io/OWNER/NAME:TAG [options] SOURCE=/PATH/IN/IMAGE ...

`

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func main() {
	var entrypoint, args, env, links list
	out := flag.String("out", "", "archive to write (required)")
	name := flag.String("name", "", "full image name with registry and tag (required)")
	user := flag.String("user", "", "UID:GID that the image runs as (default root)")
	workdir := flag.String("workdir", "", "working directory (default /)")
	arch := flag.String("arch", runtime.GOARCH, "architecture of the binaries")
	flag.Var(&entrypoint, "entrypoint", "program to run; repeat for its fixed arguments")
	flag.Var(&args, "arg", "default argument (repeatable)")
	flag.Var(&env, "env", "NAME=VALUE (repeatable)")
	flag.Var(&links, "link", "TARGET=/PATH/IN/IMAGE, a symbolic link (repeatable)")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), usage)
		flag.PrintDefaults()
	}
	flag.Parse()
	if *out == "" || !strings.Contains(*name, "/") || !strings.Contains(path.Base(*name), ":") || flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "error: --out, --name with registry and tag, and at least one SOURCE=/PATH are required")
		fmt.Fprintln(os.Stderr, "try: ociimage --help")
		os.Exit(2)
	}
	layer, err := packLayer(flag.Args(), links)
	check("pack the layer", err)
	config := map[string]any{
		"architecture": *arch,
		"os":           "linux",
		"config":       runConfig{Entrypoint: entrypoint, Cmd: args, Env: env, User: *user, WorkingDir: *workdir},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{digest(layer)}},
	}
	archive, manifest := packImage(*name, config, layer)
	check("write the archive", os.WriteFile(*out, archive, 0o644))
	fmt.Println(manifest)
}

type runConfig struct {
	Entrypoint []string `json:",omitempty"`
	Cmd        []string `json:",omitempty"`
	Env        []string `json:",omitempty"`
	User       string   `json:",omitempty"`
	WorkingDir string   `json:",omitempty"`
}

type entry struct {
	header tar.Header
	source string
}

// packLayer makes the layer's tar: every parent directory once, then files and links, all sorted by path.
func packLayer(files, links []string) ([]byte, error) {
	entries := map[string]entry{}
	add := func(target string, e entry) error {
		target = path.Clean("/" + target)[1:]
		if _, twice := entries[target]; twice || target == "" {
			return fmt.Errorf("/%s: given twice, or not a file's path", target)
		}
		e.header.Name = target
		entries[target] = e
		for dir := path.Dir(target); dir != "."; dir = path.Dir(dir) {
			entries[dir] = entry{header: tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}}
		}
		return nil
	}
	for _, spec := range files {
		source, target, ok := strings.Cut(spec, "=")
		if !ok {
			return nil, fmt.Errorf("%q: want SOURCE=/PATH/IN/IMAGE", spec)
		}
		info, err := os.Stat(source)
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%s: not a regular file", source)
		}
		mode := int64(0o644)
		if info.Mode()&0o111 != 0 {
			mode = 0o755
		}
		if strings.HasSuffix(target, "/") {
			target += filepath.Base(source)
		}
		if err := add(target, entry{tar.Header{Typeflag: tar.TypeReg, Mode: mode, Size: info.Size()}, source}); err != nil {
			return nil, err
		}
	}
	for _, spec := range links {
		points, target, ok := strings.Cut(spec, "=")
		if !ok {
			return nil, fmt.Errorf("%q: want TARGET=/PATH/IN/IMAGE", spec)
		}
		if err := add(target, entry{header: tar.Header{Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: points}}); err != nil {
			return nil, err
		}
	}
	var paths []string
	for p := range entries {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, p := range paths {
		e := entries[p]
		if err := w.WriteHeader(&e.header); err != nil {
			return nil, err
		}
		if e.source == "" {
			continue
		}
		f, err := os.Open(e.source)
		if err != nil {
			return nil, err
		}
		_, err = io.Copy(w, f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.source, err)
		}
	}
	err := w.Close()
	return layer.Bytes(), err
}

// packImage makes an OCI image layout (image-spec 1.0, image-layout.md) as a tar, and the digest of its manifest.
func packImage(name string, config any, layer []byte) ([]byte, string) {
	type descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int               `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	file := func(name string, content []byte) {
		check("write "+name, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}))
		_, err := w.Write(content)
		check("write "+name, err)
	}
	blob := func(kind string, content []byte) descriptor {
		d := digest(content)
		file("blobs/sha256/"+strings.TrimPrefix(d, "sha256:"), content)
		return descriptor{MediaType: "application/vnd.oci.image." + kind, Digest: d, Size: len(content)}
	}
	file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	manifest := blob("manifest.v1+json", encode(map[string]any{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.manifest.v1+json",
		"config":        blob("config.v1+json", encode(config)),
		"layers":        []descriptor{blob("layer.v1.tar", layer)},
	}))
	manifest.Annotations = map[string]string{
		"io.containerd.image.name":          name,
		"org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:],
	}
	file("index.json", encode(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}}))
	check("close the archive", w.Close())
	return archive.Bytes(), manifest.Digest
}

func digest(content []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(content)) }

// encode is deterministic: encoding/json sorts the keys of maps.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	check("encode JSON", err)
	return b
}

func check(what string, err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: cannot %s\nbecause: %v\n", what, err)
		os.Exit(1)
	}
}
