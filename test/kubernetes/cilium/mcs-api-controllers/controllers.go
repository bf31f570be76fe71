// Package controllers has what Cilium uses of the module of this name.
package controllers

// DerivedServiceAnnotation is set on a ServiceImport by the controller of multi-cluster services.
const DerivedServiceAnnotation = "multicluster.kubernetes.io/derived-service"
