package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"

	"github.com/ovh/kmip-go"
)

// x509Certificate is what attributes are made of in a certificate (RFC 5280 section
// 4.1). crypto/x509 refuses certificates of keys that it cannot compute with, such
// as those on secp256k1; clients keep them here nevertheless.
type x509Certificate struct {
	Body struct {
		Version    int `asn1:"optional,explicit,default:0,tag:0"`
		Serial     asn1.RawValue
		Signature  pkix.AlgorithmIdentifier
		Issuer     asn1.RawValue
		Validity   asn1.RawValue
		Subject    asn1.RawValue
		Key        subjectKey
		IssuerID   asn1.BitString   `asn1:"optional,tag:1"`
		SubjectID  asn1.BitString   `asn1:"optional,tag:2"`
		Extensions []pkix.Extension `asn1:"omitempty,optional,explicit,tag:3"`
	}
	Signature pkix.AlgorithmIdentifier
	Value     asn1.BitString
}

// subjectKey is a SubjectPublicKeyInfo.
type subjectKey struct {
	Raw       asn1.RawContent
	Algorithm pkix.AlgorithmIdentifier
	Bits      asn1.BitString
}

// signatureOIDs are those of the signature algorithms that KMIP has a name for (RFC
// 8017, RFC 5758, RFC 8692, RFC 4055).
var signatureOIDs = map[string]kmip.DigitalSignatureAlgorithm{
	"1.2.840.113549.1.1.2":    kmip.DigitalSignatureAlgorithmMD2WithRSAEncryption,
	"1.2.840.113549.1.1.4":    kmip.DigitalSignatureAlgorithmMD5WithRSAEncryption,
	"1.2.840.113549.1.1.5":    kmip.DigitalSignatureAlgorithmSHA_1WithRSAEncryption,
	"1.2.840.113549.1.1.14":   kmip.DigitalSignatureAlgorithmSHA_224WithRSAEncryption,
	"1.2.840.113549.1.1.11":   kmip.DigitalSignatureAlgorithmSHA_256WithRSAEncryption,
	"1.2.840.113549.1.1.12":   kmip.DigitalSignatureAlgorithmSHA_384WithRSAEncryption,
	"1.2.840.113549.1.1.13":   kmip.DigitalSignatureAlgorithmSHA_512WithRSAEncryption,
	"1.2.840.113549.1.1.10":   kmip.DigitalSignatureAlgorithmRSASSA_PSS,
	"1.2.840.10040.4.3":       kmip.DigitalSignatureAlgorithmDSAWithSHA_1,
	"2.16.840.1.101.3.4.3.1":  kmip.DigitalSignatureAlgorithmDSAWithSHA224,
	"2.16.840.1.101.3.4.3.2":  kmip.DigitalSignatureAlgorithmDSAWithSHA256,
	"1.2.840.10045.4.1":       kmip.DigitalSignatureAlgorithmECDSAWithSHA_1,
	"1.2.840.10045.4.3.1":     kmip.DigitalSignatureAlgorithmECDSAWithSHA224,
	"1.2.840.10045.4.3.2":     kmip.DigitalSignatureAlgorithmECDSAWithSHA256,
	"1.2.840.10045.4.3.3":     kmip.DigitalSignatureAlgorithmECDSAWithSHA384,
	"1.2.840.10045.4.3.4":     kmip.DigitalSignatureAlgorithmECDSAWithSHA512,
	"2.16.840.1.101.3.4.3.14": kmip.DigitalSignatureAlgorithmSHA3_256WithRSAEncryption,
	"2.16.840.1.101.3.4.3.15": kmip.DigitalSignatureAlgorithmSHA3_384WithRSAEncryption,
	"2.16.840.1.101.3.4.3.16": kmip.DigitalSignatureAlgorithmSHA3_512WithRSAEncryption,
}

var (
	oidECKey         = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidSecp256k1     = asn1.ObjectIdentifier{1, 3, 132, 0, 10}
	oidSubjectOthers = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidIssuerOthers  = asn1.ObjectIdentifier{2, 5, 29, 18}
)

// othersMax bounds the alternative names of one certificate that become attributes.
const othersMax = 256

// nameMax bounds the names of a certificate, in bytes: to write one out takes time that
// grows with its square.
const nameMax = 16 << 10

// describeCertificate gives o, a certificate, the attributes that its content tells
// (KMIP 1.4 sections 3.8 to 3.16). It does not check the certificate's signature or
// dates: whom to trust is the client's business.
func describeCertificate(o *Object) error {
	der := bytes.Clone(o.Material.Bytes()) // attributes outlive the material
	var c x509Certificate
	rest, err := asn1.Unmarshal(der, &c)
	if err != nil || len(rest) > 0 {
		return errCertificate
	}
	body := &c.Body
	if body.Serial.Tag != asn1.TagInteger || body.Serial.Class != asn1.ClassUniversal || len(body.Serial.Bytes) == 0 {
		return errCertificate
	}
	issuer, err := distinguished(body.Issuer.FullBytes)
	if err != nil {
		return err
	}
	subject, err := distinguished(body.Subject.FullBytes)
	if err != nil {
		return err
	}
	subjectOthers, err := others(body.Extensions, oidSubjectOthers)
	if err != nil {
		return err
	}
	issuerOthers, err := others(body.Extensions, oidIssuerOthers)
	if err != nil {
		return err
	}
	o.set(kmip.AttributeNameCertificateType, kmip.CertificateTypeX_509)
	o.set(kmip.AttributeNameCertificateLength, int32(len(der)))
	o.set(kmip.AttributeNameX509CertificateIdentifier, kmip.X_509CertificateIdentifier{
		IssuerDistinguishedName: body.Issuer.FullBytes, CertificateSerialNumber: body.Serial.FullBytes,
	})
	o.set(kmip.AttributeNameX509CertificateSubject, kmip.X_509CertificateSubject{SubjectDistinguishedName: body.Subject.FullBytes, SubjectAlternativeName: subjectOthers})
	o.set(kmip.AttributeNameX509CertificateIssuer, kmip.X_509CertificateIssuer{IssuerDistinguishedName: body.Issuer.FullBytes, IssuerAlternativeName: issuerOthers})
	serial := new(big.Int).SetBytes(body.Serial.Bytes)
	o.set(kmip.AttributeNameCertificateIdentifier, kmip.CertificateIdentifier{Issuer: issuer, SerialNumber: fmt.Sprintf("%02X", serial.Bytes())})
	o.set(kmip.AttributeNameCertificateSubject, kmip.CertificateSubject{CertificateSubjectDistinguishedName: subject})
	o.set(kmip.AttributeNameCertificateIssuer, kmip.CertificateIssuer{CertificateIssuerDistinguishedName: issuer})
	if named, ok := signatureOIDs[c.Signature.Algorithm.String()]; ok {
		o.set(kmip.AttributeNameDigitalSignatureAlgorithm, named)
	}
	algorithm, bits := body.Key.describe()
	if algorithm != 0 {
		o.set(kmip.AttributeNameCryptographicAlgorithm, algorithm)
	}
	if bits != 0 {
		o.set(kmip.AttributeNameCryptographicLength, bits)
	}
	return nil
}

var errCertificate = refuse(kmip.ResultReasonInvalidField, "the certificate is not X.509 in DER")

// distinguished returns a Name in the form of RFC 2253.
func distinguished(der []byte) (string, error) {
	if len(der) > nameMax {
		return "", refuse(kmip.ResultReasonInvalidField, "a certificate with a name of over %d bytes", nameMax)
	}
	var name pkix.RDNSequence
	if rest, err := asn1.Unmarshal(der, &name); err != nil || len(rest) > 0 {
		return "", errCertificate
	}
	return name.String(), nil
}

// others returns the alternative names, General Names in DER, of extension id.
func others(extensions []pkix.Extension, id asn1.ObjectIdentifier) ([][]byte, error) {
	for _, e := range extensions {
		if !e.Id.Equal(id) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) > 0 {
			return nil, errCertificate
		}
		if len(names) > othersMax {
			return nil, refuse(kmip.ResultReasonInvalidField, "a certificate with over %d alternative names", othersMax)
		}
		var list [][]byte
		for _, n := range names {
			list = append(list, n.FullBytes)
		}
		return list, nil
	}
	return nil, nil
}

// describe returns the algorithm and the length in bits of a key, 0 where this
// server does not know it.
func (k subjectKey) describe() (kmip.CryptographicAlgorithm, int32) {
	if k.Algorithm.Algorithm.Equal(oidECKey) {
		var curve asn1.ObjectIdentifier
		if _, err := asn1.Unmarshal(k.Algorithm.Parameters.FullBytes, &curve); err == nil && curve.Equal(oidSecp256k1) {
			return kmip.CryptographicAlgorithmECDSA, 256
		}
	}
	key, err := x509.ParsePKIXPublicKey(k.Raw)
	if err != nil {
		return 0, 0
	}
	switch key := key.(type) {
	case *rsa.PublicKey:
		return kmip.CryptographicAlgorithmRSA, int32(key.N.BitLen())
	case *ecdsa.PublicKey:
		return kmip.CryptographicAlgorithmECDSA, int32(key.Params().BitSize)
	}
	return 0, 0
}
