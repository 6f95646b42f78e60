// pki writes the certificates and kubeconfigs of a cluster that lives for a test run.
//
//	pki cluster DIR SERVER_URL NODE_NAME IP...   everything the components and the administrator need
//	pki user    DIR SERVER_URL NAME [GROUP...]   one more kubeconfig, by a client certificate without any right
//
// DIR gets pki/*.crt|key (kubeadm's names) and kubeconfig/*.yaml.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

func main() {
	if len(os.Args) < 5 {
		fmt.Fprintln(os.Stderr, "usage: pki cluster DIR SERVER_URL NODE_NAME IP... | pki user DIR SERVER_URL NAME [GROUP...]")
		os.Exit(2)
	}
	dir, server, name, rest := os.Args[2], os.Args[3], os.Args[4], os.Args[5:]
	switch os.Args[1] {
	case "cluster":
		cluster(dir, server, name, rest)
	case "user":
		ca := load(dir, "ca")
		kubeconfig(dir, "user-"+name, server, ca, sign(&ca, pkix.Name{CommonName: name, Organization: rest}, nil))
	default:
		fail(fmt.Errorf("unknown command %q", os.Args[1]))
	}
}

func cluster(dir, server, node string, ips []string) {
	check(os.MkdirAll(filepath.Join(dir, "pki"), 0o700))
	check(os.MkdirAll(filepath.Join(dir, "kubeconfig"), 0o755))
	ca := sign(nil, pkix.Name{CommonName: "kubernetes"}, nil)
	front := sign(nil, pkix.Name{CommonName: "front-proxy-ca"}, nil)
	nodeName := pkix.Name{CommonName: "system:node:" + node, Organization: []string{"system:nodes"}}
	admin := pkix.Name{CommonName: "kubernetes-admin", Organization: []string{"system:masters"}}
	apiserverNames := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"}
	for name, pair := range map[string]pair{
		"ca":                       ca,
		"front-proxy-ca":           front,
		"front-proxy-client":       sign(&front, pkix.Name{CommonName: "front-proxy-client"}, nil),
		"apiserver":                sign(&ca, pkix.Name{CommonName: "kube-apiserver"}, append(apiserverNames, ips...)),
		"apiserver-kubelet-client": sign(&ca, pkix.Name{CommonName: "apiserver-kubelet-client", Organization: []string{"system:masters"}}, nil),
		"kubelet":                  sign(&ca, nodeName, append([]string{node}, ips...)),
		"sa":                       sign(nil, pkix.Name{CommonName: "service-accounts"}, nil),
	} {
		store(dir, name, pair)
	}
	for name, subject := range map[string]pkix.Name{
		"admin":              admin,
		"kubelet":            nodeName,
		"controller-manager": {CommonName: "system:kube-controller-manager"},
		"scheduler":          {CommonName: "system:kube-scheduler"},
		"kube-proxy":         {CommonName: "system:kube-proxy"},
	} {
		kubeconfig(dir, name, server, ca, sign(&ca, subject, nil))
	}
}

type pair struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// sign makes a key and its certificate: a server's and client's one below ca, or a certificate authority when ca is nil.
func sign(ca *pair, subject pkix.Name, names []string) pair {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	check(err)
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      subject,
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	if ca == nil {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.KeyUsage |= x509.KeyUsageCertSign | x509.KeyUsageCRLSign
		template.ExtKeyUsage = nil
		ca = &pair{key, template}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	check(err)
	cert, err := x509.ParseCertificate(der)
	check(err)
	return pair{key, cert}
}

func (p pair) certPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw})
}

func (p pair) keyPEM() []byte {
	der, err := x509.MarshalECPrivateKey(p.key)
	check(err)
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func store(dir, name string, p pair) {
	path := filepath.Join(dir, "pki", name)
	check(os.WriteFile(path+".crt", p.certPEM(), 0o644))
	check(os.WriteFile(path+".key", p.keyPEM(), 0o600))
}

func load(dir, name string) pair {
	path := filepath.Join(dir, "pki", name)
	decode := func(file string) []byte {
		content, err := os.ReadFile(file)
		check(err)
		block, _ := pem.Decode(content)
		if block == nil {
			fail(fmt.Errorf("%s holds no PEM block", file))
		}
		return block.Bytes
	}
	cert, err := x509.ParseCertificate(decode(path + ".crt"))
	check(err)
	key, err := x509.ParseECPrivateKey(decode(path + ".key"))
	check(err)
	return pair{key, cert}
}

// kubeconfig writes a file that the laptop's users can read: the cluster guards nothing but tests.
func kubeconfig(dir, name, server string, ca, user pair) {
	b64 := base64.StdEncoding.EncodeToString
	content := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: forkd-cluster
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: %[3]q
  user:
    client-certificate-data: %[4]s
    client-key-data: %[5]s
contexts:
- name: forkd-cluster
  context:
    cluster: forkd-cluster
    user: %[3]q
current-context: forkd-cluster
`, server, b64(ca.certPEM()), user.cert.Subject.CommonName, b64(user.certPEM()), b64(user.keyPEM()))
	path := filepath.Join(dir, "kubeconfig", name+".yaml")
	check(os.WriteFile(path, []byte(content), 0o644))
}

func check(err error) {
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintf(os.Stderr, "error: cannot write the cluster's certificates\nbecause: %v\n", err)
	os.Exit(1)
}
